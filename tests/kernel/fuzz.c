// SPDX-License-Identifier: MIT
/*
 * Requests that are nearly right, by the hundred thousand.
 *
 *	fuzz PROGRAM MESSAGES THREADS SEED
 *
 * Each thread composes good requests about processes of that program, about itself, and about
 * processes that are dead, recycled, somebody else's or the kernel's; breaks most of them in a few
 * places (fuzz_mistakes.h); sends them; and holds whatever comes back against the contract. What
 * the processes' memory must be afterwards, whoever started this program looks after. Our own we
 * verify here. At the end: one line of JSON, or one that begins with "wrong:".
 */
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "netlink.h"
#include "victims.h"

#include "fuzz_mistakes.h"

#define MAX_THREADS 8
#define MAX_ERRNO 134
#define LOOK_AGAIN_MESSAGES 2000

struct fuzzer {
	pthread_t thread;
	uint64_t messages;
	struct netlink link;
	struct victims victims;
	struct composer composer;
	/* Of the answers to the request under way. */
	uint32_t replies;
	uint64_t asked[MERGEMEM_CMD_MAX + 1], abandoned;
	uint64_t results[__MERGEMEM_RESULT_COUNT], errors[MAX_ERRNO];
};

static struct fuzzer fuzzer[MAX_THREADS];
static const char *victim_program;

static void wrong(const struct fuzzer *self, const char *what, uint64_t is)
{
	printf("wrong: %s (%#lx) in answer to", what, is);
	for (size_t n = 0; n < self->composer.message.length && n < 400; n++)
		printf("%s%02x", n % 4 ? "" : " ", self->composer.message.bytes[n]);
	printf("\n");
	exit(1);
}

/* ---- what the contract promises of any answer ---- */

static void judge_records(struct fuzzer *self, const struct nlattr *records)
{
	const struct mergemem_record *record = content_of(records);

	if (!length_of(records) || length_of(records) % sizeof(*record))
		wrong(self, "length of RECORDS", length_of(records));
	for (size_t n = 0; n < length_of(records) / sizeof(*record); n++, record++) {
		bool has_bytes = record->state >= MERGEMEM_STATE_ANON &&
				 record->state <= MERGEMEM_STATE_PINNED;

		if (record->state > MERGEMEM_STATE_REFUSED)
			wrong(self, "state", record->state);
		if (record->order > 18)
			wrong(self, "order", record->order);
		if (!has_bytes && record->checksum)
			wrong(self, "a checksum of no page", record->state);
		if (has_bytes && !record->map_count)
			wrong(self, "a page that nobody maps", record->state);
	}
}

static void judge_results(struct fuzzer *self, const struct nlattr *results)
{
	const uint8_t *result = content_of(results);

	for (size_t n = 0; n < length_of(results); n++) {
		if (result[n] >= __MERGEMEM_RESULT_COUNT)
			wrong(self, "result", result[n]);
		self->results[result[n]]++;
	}
}

static void judge_reply(const struct nlattr *attributes, size_t length, void *context)
{
	const struct nlattr *attribute;
	struct fuzzer *self = context;
	uint64_t address;

	self->replies++;
	while ((attribute = next_attribute(&attributes, &length))) {
		switch (attribute->nla_type) {
		case MERGEMEM_A_RECORDS:
			judge_records(self, attribute);
			break;
		case MERGEMEM_A_RESULTS:
			judge_results(self, attribute);
			break;
		case MERGEMEM_A_ADDRESS:
		case MERGEMEM_A_NEXT:
			memcpy(&address, content_of(attribute), sizeof(address));
			if (address % PAGE_BYTES || address >= 1UL << 56)
				wrong(self, "address", address);
		}
	}
}

/* Refusals of a malformed request say why; a few errors are the netlink core's own. */
static void judge_error(struct fuzzer *self, int error)
{
	static const int known[] = {
		0, EINVAL, ERANGE, ESRCH, EACCES, EBUSY, ENOMEM, EOPNOTSUPP, ENOENT, EMSGSIZE,
		EAGAIN, EPERM,
	};
	unsigned int n;

	for (n = 0; n < sizeof(known) / sizeof(known[0]); n++)
		if (-error == known[n])
			break;
	if (n == sizeof(known) / sizeof(known[0]))
		wrong(self, "errno", -error);
	self->errors[-error]++;
	if ((error == -ERANGE || error == -ESRCH || error == -EACCES) && !self->link.text[0])
		wrong(self, "no text with errno", -error);
}

/* ---- one thread ---- */

static void send_one(struct fuzzer *self)
{
	struct composer *composer = &self->composer;
	bool abandon;
	int error;

	compose_request(composer, &self->victims, self->link.family);
	mutate_request(composer);
	finish_request(composer, ++self->link.sequence);
	if (composer->command <= MERGEMEM_CMD_MAX)
		self->asked[composer->command]++;
	error = netlink_send(&self->link, &composer->message);
	if (error)
		/* Longer than the socket's buffer. */
		return judge_error(self, error);
	/* Now and then nobody reads to the end, and the socket is closed, or used for the next. */
	abandon = !(below(composer, 32));
	self->replies = 0;
	error = netlink_receive(&self->link, abandon ? below(composer, 3) : -1U, judge_reply, self);
	judge_error(self, error);
	if (abandon) {
		self->abandoned++;
		if (below(composer, 2))
			netlink_reopen(&self->link);
	}
}

static void *fuzz(void *context)
{
	struct fuzzer *self = context;

	netlink_open(&self->link);
	if (netlink_find_family(&self->link, &self->composer.message))
		die("the family mergemem");
	for (uint64_t n = 0; n < self->messages; n++) {
		if (n % LOOK_AGAIN_MESSAGES == 0)
			find_victims(&self->victims, victim_program);
		send_one(self);
	}
	close(self->link.socket);
	return NULL;
}

/* ---- all of them ---- */

static void verify_own(const uint64_t *own)
{
	for (size_t n = 0; n < OWN_PAGES * PAGE_BYTES / sizeof(*own); n++)
		if (own[n] != own_word(n)) {
			printf("wrong: our own word %zu is %#lx\n", n, own[n]);
			exit(1);
		}
}

/* A child that has ended, and whose pid is free: nobody, or some day another. */
static struct mergemem_process bury_somebody(void)
{
	pid_t child = fork();
	struct mergemem_process dead = { .pid = child };

	if (!child)
		_exit(0);
	dead.start_time = start_time_of(child);
	waitpid(child, NULL, 0);
	return dead;
}

static void print_numbers(const char *name, const uint64_t *numbers, unsigned int count)
{
	printf("\"%s\": [", name);
	for (unsigned int n = 0; n < count; n++)
		printf("%s%lu", n ? ", " : "", numbers[n]);
	printf("], ");
}

int main(int count, char **words)
{
	struct fuzzer *sum = &fuzzer[0];
	unsigned int threads;
	uint64_t *own;

	if (count != 5)
		return 2;
	victim_program = words[1];
	threads = strtoul(words[3], NULL, 10);
	if (threads > MAX_THREADS)
		return 2;
	own = mmap(NULL, OWN_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (own == MAP_FAILED)
		die("mmap");
	for (size_t n = 0; n < OWN_PAGES * PAGE_BYTES / sizeof(*own); n++)
		own[n] = own_word(n);
	for (unsigned int n = 0; n < threads; n++) {
		struct composer *composer = &fuzzer[n].composer;

		composer->random = strtoull(words[4], NULL, 10) * MAX_THREADS + n + 1;
		composer->own_address = (uintptr_t)own;
		composer->strange[0] = (struct mergemem_process){ getpid(), 0,
								  start_time_of(getpid()) };
		composer->strange[1] = bury_somebody();
		/* init, and a kernel thread. */
		composer->strange[2] = (struct mergemem_process){ 1, 0, start_time_of(1) };
		composer->strange[3] = (struct mergemem_process){ 2, 0, start_time_of(2) };
		fuzzer[n].messages = strtoull(words[2], NULL, 10) / threads;
	}
	for (unsigned int n = 0; n < threads; n++) {
		errno = pthread_create(&fuzzer[n].thread, NULL, fuzz, &fuzzer[n]);
		if (errno)
			die("pthread_create");
	}
	for (unsigned int n = 0; n < threads; n++) {
		pthread_join(fuzzer[n].thread, NULL);
		for (unsigned int i = 0; n && i <= MERGEMEM_CMD_MAX; i++)
			sum->asked[i] += fuzzer[n].asked[i];
		for (unsigned int i = 0; n && i < __MERGEMEM_RESULT_COUNT; i++)
			sum->results[i] += fuzzer[n].results[i];
		for (unsigned int i = 0; n && i < MAX_ERRNO; i++)
			sum->errors[i] += fuzzer[n].errors[i];
		sum->abandoned += n ? fuzzer[n].abandoned : 0;
	}
	verify_own(own);
	printf("{");
	print_numbers("asked", sum->asked, MERGEMEM_CMD_MAX + 1);
	print_numbers("results", sum->results, __MERGEMEM_RESULT_COUNT);
	print_numbers("errors", sum->errors, MAX_ERRNO);
	printf("\"abandoned\": %lu}\n", sum->abandoned);
	return 0;
}
