// SPDX-License-Identifier: MIT
/*
 * Several clients of the module at once, all after the same processes.
 *
 *	clients PROGRAM THREADS SEED
 *
 * Each thread looks for processes of that program again and again, and checksums, merges and unmerges
 * parts of them at random; which parts others work on, or whether the process still exists, it does
 * not ask. It goes on when the module is unloaded and comes back, until our standard input ends. Then,
 * and for each line that it reads there: one line of JSON, with all that has happened so far; or, as
 * soon as an answer breaks the contract, a line "wrong: ...".
 */
#include <pthread.h>
#include <time.h>

#include "netlink.h"
#include "victims.h"

#define MAX_THREADS 16
#define MAX_ERRNO 134
#define WINDOW_PAGES 1024
#define LOOK_AGAIN_NS 200000000UL

/* One page that CHECKSUM showed. */
struct seen {
	uint64_t checksum, address;
	uint32_t process;
	uint16_t state;
};

struct client {
	pthread_t thread;
	uint64_t random;
	struct netlink link;
	struct message message;
	struct victims victims;
	/* What is being asked about, for those who read the answers. */
	uint32_t process, candidates, seen_count;
	uint64_t start, end;
	struct seen seen[MERGEMEM_MAX_CANDIDATES];
	/* What was asked for, what came of it. */
	uint64_t asked[MERGEMEM_CMD_MAX + 1], abandoned, unmerged, absences;
	uint64_t results[__MERGEMEM_RESULT_COUNT], errors[MAX_ERRNO];
};

static struct client client[MAX_THREADS];
static const char *victim_program;
static bool stop;

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000UL + now.tv_nsec;
}

static uint64_t chance(struct client *self, uint64_t below)
{
	self->random ^= self->random << 13;
	self->random ^= self->random >> 7;
	self->random ^= self->random << 17;
	return self->random % below;
}

static void wrong(const char *what, uint64_t is, uint64_t should)
{
	printf("wrong: %s: %#lx, not %#lx\n", what, is, should);
	exit(1);
}

/* Sends what was composed; counts the answer. */
static int ask(struct client *self, uint8_t command, reply_function *reply)
{
	int error = netlink_request(&self->link, &self->message, reply, self);

	self->asked[command]++;
	if (error <= -MAX_ERRNO || error > 0)
		wrong("errno", -error, 0);
	if (error)
		self->errors[-error]++;
	if (error == -EAGAIN)
		wrong("request without an answer", command, 0);
	/* The module is gone; its number may be another one when it is back. */
	if (error == -ENOENT || error == -EOPNOTSUPP)
		self->link.family = 0;
	return error;
}

static void compose(struct client *self, uint8_t command)
{
	message_begin(&self->message, self->link.family,
		      command == MERGEMEM_CMD_CHECKSUM ? NLM_F_DUMP : 0, command);
}

/* A part of a mapping, or now and then all of it; false when there is nobody. */
static bool choose_window(struct client *self)
{
	const struct range *range;
	uint64_t pages, first = 0;

	if (!self->victims.range_count)
		return false;
	range = &self->victims.range[chance(self, self->victims.range_count)];
	pages = range->pages;
	if (pages > WINDOW_PAGES) {
		first = chance(self, pages - WINDOW_PAGES);
		pages = WINDOW_PAGES;
	}
	self->process = range->victim;
	self->start = range->address + first * PAGE_BYTES;
	self->end = self->start + pages * PAGE_BYTES;
	return true;
}

static void compose_range(struct client *self, uint8_t command)
{
	compose(self, command);
	message_put(&self->message, MERGEMEM_A_PROCESSES,
		    &self->victims.process[self->process], sizeof(struct mergemem_process));
	message_put_u64(&self->message, MERGEMEM_A_ADDRESS, self->start);
	message_put_u64(&self->message, MERGEMEM_A_PAGES, (self->end - self->start) / PAGE_BYTES);
}

static void take_records(const struct nlattr *attributes, size_t length, void *context)
{
	const struct nlattr *address_is = find_attribute(attributes, length, MERGEMEM_A_ADDRESS);
	const struct nlattr *records = find_attribute(attributes, length, MERGEMEM_A_RECORDS);
	const struct mergemem_record *record;
	struct client *self = context;
	uint64_t address;

	if (!address_is)
		wrong("a run without ADDRESS", 0, 0);
	memcpy(&address, content_of(address_is), sizeof(address));
	if (address < self->start || address >= self->end)
		wrong("a run outside of the range", address, self->start);
	if (!records)
		return;
	record = content_of(records);
	for (size_t n = 0; n < length_of(records) / sizeof(*record); n++, record++) {
		if (record->state > MERGEMEM_STATE_REFUSED)
			wrong("state", record->state, 0);
		if (record->state < MERGEMEM_STATE_ANON || record->state > MERGEMEM_STATE_HUGE ||
		    self->seen_count == MERGEMEM_MAX_CANDIDATES)
			continue;
		self->seen[self->seen_count++] = (struct seen){
			record->checksum, address + n * PAGE_BYTES, self->process, record->state,
		};
	}
}

static int by_checksum(const void *a, const void *b)
{
	const struct seen *seen_a = a, *seen_b = b;

	return (seen_a->checksum > seen_b->checksum) - (seen_a->checksum < seen_b->checksum);
}

static void take_results(const struct nlattr *attributes, size_t length, void *context)
{
	const struct nlattr *results = find_attribute(attributes, length, MERGEMEM_A_RESULTS);
	struct client *self = context;
	const uint8_t *result;

	if (!results || length_of(results) != self->candidates)
		wrong("number of results", results ? length_of(results) : 0, self->candidates);
	result = content_of(results);
	for (uint32_t n = 0; n < self->candidates; n++) {
		if (result[n] >= __MERGEMEM_RESULT_COUNT)
			wrong("result", result[n], 0);
		self->results[result[n]]++;
	}
}

/* MERGE of what was seen: groups of equal checksums, or of what lies next to each other. */
static void merge_seen(struct client *self, bool honestly)
{
	uint32_t n, group = 0, count = self->seen_count;
	struct mergemem_candidate *candidate;

	if (honestly)
		qsort(self->seen, count, sizeof(self->seen[0]), by_checksum);
	compose(self, MERGEMEM_CMD_MERGE);
	message_put(&self->message, MERGEMEM_A_PROCESSES, self->victims.process,
		    self->victims.count * sizeof(struct mergemem_process));
	candidate = message_reserve(&self->message, MERGEMEM_A_CANDIDATES,
				    count * sizeof(*candidate));
	for (n = 0; n < count; n++) {
		const struct seen *seen = &self->seen[n];

		if (n && (honestly ? seen->checksum != seen[-1].checksum : !chance(self, 4)))
			group++;
		candidate[n] = (struct mergemem_candidate){ seen->address, seen->process, group };
		if (honestly ? seen->state == MERGEMEM_STATE_ZERO : !chance(self, 50))
			candidate[n].group = MERGEMEM_GROUP_ZERO;
	}
	if (chance(self, 2))
		message_put_u32(&self->message, MERGEMEM_A_SPLIT_PERCENT, 1 + chance(self, 100));
	if (chance(self, 2))
		message_put_u32(&self->message, MERGEMEM_A_FLAGS, MERGEMEM_MERGE_ANY_NODE);
	self->candidates = count;
	ask(self, MERGEMEM_CMD_MERGE, take_results);
}

/* CHECKSUM of a few parts, then MERGE. */
static void merge_some(struct client *self)
{
	uint64_t windows = 2 + chance(self, 4);

	self->seen_count = 0;
	while (windows-- && choose_window(self)) {
		compose_range(self, MERGEMEM_CMD_CHECKSUM);
		message_put_u32(&self->message, MERGEMEM_A_DEPTH, MERGEMEM_DEPTH_FULL_BYTES);
		if (ask(self, MERGEMEM_CMD_CHECKSUM, take_records) == -ENOENT)
			return;
	}
	if (self->seen_count)
		merge_seen(self, chance(self, 8));
}

/* A dump whose reader goes away, or never comes back to it before the next request. */
static void abandon_dump(struct client *self)
{
	struct nlmsghdr *header = (struct nlmsghdr *)self->message.bytes;

	if (!choose_window(self))
		return;
	compose_range(self, MERGEMEM_CMD_CHECKSUM);
	message_put_u32(&self->message, MERGEMEM_A_DEPTH, MERGEMEM_DEPTH_STEP_BYTES);
	header->nlmsg_len = self->message.length;
	netlink_send(&self->link, &self->message);
	netlink_receive(&self->link, chance(self, 3), NULL, NULL);
	netlink_reopen(&self->link);
	self->abandoned++;
}

static void take_unmerged(const struct nlattr *attributes, size_t length, void *context)
{
	const struct nlattr *unmerged = find_attribute(attributes, length, MERGEMEM_A_UNMERGED);
	const struct nlattr *next = find_attribute(attributes, length, MERGEMEM_A_NEXT);
	struct client *self = context;
	uint64_t pages, address;

	if (!unmerged || !next)
		wrong("UNMERGE without UNMERGED or NEXT", 0, 0);
	memcpy(&pages, content_of(unmerged), sizeof(pages));
	memcpy(&address, content_of(next), sizeof(address));
	if (address < self->start || address > self->end)
		wrong("NEXT", address, self->end);
	if (pages > (self->end - self->start) / PAGE_BYTES)
		wrong("UNMERGED", pages, (self->end - self->start) / PAGE_BYTES);
	self->unmerged += pages;
}

static void unmerge_some(struct client *self)
{
	if (!choose_window(self))
		return;
	if (!chance(self, 8)) {
		/* Everything. */
		self->start = 0;
		self->end = (1UL << 47) - PAGE_BYTES;
	}
	compose_range(self, MERGEMEM_CMD_UNMERGE);
	if (!chance(self, 4)) {
		message_put(&self->message, MERGEMEM_A_COUNT_ONLY, NULL, 0);
		ask(self, MERGEMEM_CMD_UNMERGE, NULL);
	} else {
		ask(self, MERGEMEM_CMD_UNMERGE, take_unmerged);
	}
}

static void *be_a_client(void *context)
{
	uint64_t look_again_ns = 0;
	struct client *self = context;

	netlink_open(&self->link);
	while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
		if (now_ns() > look_again_ns) {
			find_victims(&self->victims, victim_program);
			look_again_ns = now_ns() + LOOK_AGAIN_NS;
		}
		if (!self->link.family && netlink_find_family(&self->link, &self->message)) {
			self->absences++;
			usleep(20000);
			continue;
		}
		switch (chance(self, 10)) {
		case 0:
			compose(self, MERGEMEM_CMD_INFO);
			ask(self, MERGEMEM_CMD_INFO, NULL);
			break;
		case 1:
			abandon_dump(self);
			break;
		case 2:
		case 3:
			unmerge_some(self);
			break;
		default:
			merge_some(self);
		}
	}
	close(self->link.socket);
	return NULL;
}

static void print_numbers(const char *name, const uint64_t *numbers, unsigned int count)
{
	printf("\"%s\": [", name);
	for (unsigned int n = 0; n < count; n++)
		printf("%s%lu", n ? ", " : "", numbers[n]);
	printf("], ");
}

static uint64_t so_far(const uint64_t *number)
{
	return __atomic_load_n(number, __ATOMIC_RELAXED);
}

/* What has happened so far, all threads together. */
static void report(void)
{
	struct client sum = {};

	for (const struct client *one = client; one < client + MAX_THREADS; one++) {
		for (unsigned int i = 0; i <= MERGEMEM_CMD_MAX; i++)
			sum.asked[i] += so_far(&one->asked[i]);
		for (unsigned int i = 0; i < __MERGEMEM_RESULT_COUNT; i++)
			sum.results[i] += so_far(&one->results[i]);
		for (unsigned int i = 0; i < MAX_ERRNO; i++)
			sum.errors[i] += so_far(&one->errors[i]);
		sum.abandoned += so_far(&one->abandoned);
		sum.unmerged += so_far(&one->unmerged);
		sum.absences += so_far(&one->absences);
	}
	printf("{");
	print_numbers("asked", sum.asked, MERGEMEM_CMD_MAX + 1);
	print_numbers("results", sum.results, __MERGEMEM_RESULT_COUNT);
	print_numbers("errors", sum.errors, MAX_ERRNO);
	printf("\"abandoned\": %lu, \"unmerged\": %lu, \"absences\": %lu}\n", sum.abandoned,
	       sum.unmerged, sum.absences);
	fflush(stdout);
}

int main(int count, char **words)
{
	unsigned int threads;
	char byte;

	if (count != 4)
		return 2;
	victim_program = words[1];
	threads = strtoul(words[2], NULL, 10);
	for (unsigned int n = 0; n < threads && n < MAX_THREADS; n++) {
		client[n].random = strtoull(words[3], NULL, 10) * MAX_THREADS + n + 1;
		errno = pthread_create(&client[n].thread, NULL, be_a_client, &client[n]);
		if (errno)
			die("pthread_create");
	}
	while (read(STDIN_FILENO, &byte, 1) > 0)
		if (byte == '\n')
			report();
	__atomic_store_n(&stop, true, __ATOMIC_SEQ_CST);
	for (unsigned int n = 0; n < threads && n < MAX_THREADS; n++)
		pthread_join(client[n].thread, NULL);
	report();
	return 0;
}
