// SPDX-License-Identifier: MIT
/*
 * Merges the pages of a judge's processes, all the time and as recklessly as the contract allows.
 *
 *	merger [zero=0|1] [split=0|1] [plant=0|1] [seed=N] [rounds=N]
 *
 * Works on all descendants of the process that started it, itself excepted, until SIGTERM or the
 * end of its rounds; then prints one line of JSON. Round after round it
 *
 *	reads a full checksum of every page, and at once, without waiting for pages to settle,
 *	nominates all that have equal ones, in requests as large as they may be;
 *	nominates pages at random that are not equal (the kernel must see it);
 *	unmerges a range at random.
 *
 * plant=1 is a planted fault: in each request it flips a byte of a page that was merged, as a
 * broken kernel might. A judge that passes in spite of that is no judge.
 *
 *	netlink.h	requests and replies
 *	family.h	whose pages
 *	census.h	which pages
 *	batch.h		requests to merge them
 */
#include <signal.h>

#include "batch.h"

/* A group that is all merged is nominated again only now and then. */
#define AGAIN_EVERY_ROUNDS 8
#define MEMBERS_A_ROUND 24

static struct mergemem_totals totals;
static uint64_t split_folios;

/* Signals to end are blocked, and looked for between requests: none is cut short. */
static bool ended(void)
{
	sigset_t pending;

	sigpending(&pending);
	return sigismember(&pending, SIGTERM) || sigismember(&pending, SIGINT);
}

/* Pages that seem to be equal, as one group or, if there are many, several. */
static void nominate(const struct page *first, uint32_t count)
{
	/* Zeros may be merged like any other content, and both ways must be safe. */
	bool zero = option.zero && first->state == MERGEMEM_STATE_ZERO && random_below(4);

	while (count >= (zero ? 1 : 2)) {
		uint32_t part = count < MERGEMEM_MAX_PROCESSES ? count : MERGEMEM_MAX_PROCESSES;

		batch_reserve(part);
		for (uint32_t i = 0; i < part; i++)
			batch_add(first + i, zero ? MERGEMEM_GROUP_ZERO : batch.groups);
		batch.groups += !zero;
		first += part;
		count -= part;
	}
}

static void nominate_all(void)
{
	bool again = counted.rounds % AGAIN_EVERY_ROUNDS == 0;

	for (uint32_t i = 0, next; i < page_count; i = next) {
		bool fresh = false;

		for (next = i; next < page_count && pages[next].checksum == pages[i].checksum &&
			       pages[next].uid == pages[i].uid; next++)
			fresh |= pages[next].state != MERGEMEM_STATE_MERGED;
		if (fresh || again)
			nominate(&pages[i], next - i);
	}
	batch_send();
}

/* Groups of pages of one user that have nothing else in common. */
static void nominate_blindly(void)
{
	for (uint32_t i = 0; i < 256 && page_count > 1; i++) {
		const struct page *first = &pages[random_below(page_count)];
		uint32_t before;

		batch_reserve(4);
		before = batch.count;
		for (uint32_t k = 0; k < 4; k++) {
			const struct page *page = &pages[random_below(page_count)];

			if (page->uid == first->uid)
				batch_add(page, batch.groups);
		}
		batch.groups += batch.count > before;
	}
	counted.blind_candidates += batch.count;
	batch_send();
}

static void keep_unmerged(const struct nlattr *attributes, size_t bytes)
{
	size_t length;
	const uint64_t *unmerged = find(attributes, bytes, MERGEMEM_A_UNMERGED, &length);

	if (unmerged)
		counted.unmerged_pages += *unmerged;
}

static void unmerge_somewhere(void)
{
	const struct page *page = &pages[random_below(page_count)];
	uint64_t room, count = 1 + random_below(512);

	if (!page_count)
		return;
	room = WHOLE_ADDRESS_SPACE / PAGE_BYTES - page->address / PAGE_BYTES - 1;
	request_begin(MERGEMEM_CMD_UNMERGE, 0);
	put(MERGEMEM_A_PROCESSES, &members[page->member].process, sizeof(struct mergemem_process));
	put_u64(MERGEMEM_A_ADDRESS, page->address);
	put_u64(MERGEMEM_A_PAGES, count < room ? count : room);
	counted.unmerge_requests++;
	tolerate(request_send(keep_unmerged), "UNMERGE");
}

static void keep_info(const struct nlattr *attributes, size_t bytes)
{
	size_t length;
	const struct mergemem_totals *found = find(attributes, bytes, MERGEMEM_A_TOTALS, &length);
	const void *counters;

	if (length >= sizeof(totals))
		totals = *found;
	counters = find(attributes, bytes, MERGEMEM_A_COUNTERS, &length);
	if (counters && length >= sizeof(struct mergemem_counters))
		split_folios = ((const struct mergemem_counters *)counters)->split_folios;
}

static void read_info(void)
{
	request_begin(MERGEMEM_CMD_INFO, 0);
	tolerate(request_send(keep_info), "INFO");
	if (totals.shared_mappings > counted.peak_shared_mappings)
		counted.peak_shared_mappings = totals.shared_mappings;
}

/*
 * Of many processes a few, others each round: short-lived ones would be gone before the last has
 * been read.
 */
static void choose_members(void)
{
	for (unsigned int i = 0; i < member_count && i < MEMBERS_A_ROUND; i++) {
		unsigned int other = i + random_below(member_count - i);
		struct member chosen = members[other];

		members[other] = members[i];
		members[i] = chosen;
	}
	if (member_count > MEMBERS_A_ROUND)
		member_count = MEMBERS_A_ROUND;
}

static void go_round(void)
{
	family_find(getppid());
	choose_members();
	census_begin();
	for (unsigned int i = 0; i < member_count && !ended(); i++)
		tolerate(census_of(i), "CHECKSUM");
	counted.members += member_count;
	counted.read_pages += page_count;
	census_sort();
	nominate_all();
	if (!random_below(4))
		nominate_blindly();
	if (!random_below(4))
		unmerge_somewhere();
	read_info();
	counted.rounds++;
	if (!page_count)
		usleep(1000);
}

static void print_array(const char *name, const uint64_t *values, unsigned int count)
{
	const char *comma = "";

	printf("\"%s\": {", name);
	for (unsigned int i = 0; i < count; i++)
		if (values[i]) {
			printf("%s\"%u\": %llu", comma, i, (unsigned long long)values[i]);
			comma = ", ";
		}
	printf("}, ");
}

static void report(uint64_t splits)
{
	const struct {
		const char *name;
		uint64_t value;
	} numbers[] = {
		{ "rounds", counted.rounds },
		{ "members", counted.members },
		{ "read_pages", counted.read_pages },
		{ "requests", counted.requests },
		{ "candidates", counted.candidates },
		{ "blind_candidates", counted.blind_candidates },
		{ "unmerge_requests", counted.unmerge_requests },
		{ "unmerged_pages", counted.unmerged_pages },
		{ "planted", counted.planted },
		{ "peak_shared_mappings", counted.peak_shared_mappings },
		{ "split_folios", splits },
		{ "shared_pages", totals.shared_pages },
		{ "shared_mappings", totals.shared_mappings },
	};

	printf("{");
	print_array("results", counted.results, RESULTS);
	print_array("errors", counted.errors, MAX_ERRNO);
	for (unsigned int i = 0; i < sizeof(numbers) / sizeof(*numbers); i++)
		printf("%s\"%s\": %llu", i ? ", " : "", numbers[i].name,
		       (unsigned long long)numbers[i].value);
	printf("}\n");
}

static void read_option(const char *word)
{
	static const struct {
		const char *name;
		bool *flag;
		uint64_t *number;
	} known[] = {
		{ "zero=", &option.zero, NULL },     { "split=", &option.split, NULL },
		{ "plant=", &option.plant, NULL },   { "seed=", NULL, &option.seed },
		{ "rounds=", NULL, &option.rounds },
	};

	for (unsigned int i = 0; i < sizeof(known) / sizeof(*known); i++) {
		size_t length = strlen(known[i].name);

		if (strncmp(word, known[i].name, length))
			continue;
		if (known[i].flag)
			*known[i].flag = strtoull(word + length, NULL, 0);
		else
			*known[i].number = strtoull(word + length, NULL, 0);
		return;
	}
	fprintf(stderr, "merger: no option %s\n", word);
	exit(2);
}

int main(int count, char **words)
{
	sigset_t end_signals;
	uint64_t splits_before;

	for (int i = 1; i < count; i++)
		read_option(words[i]);
	random_state = option.seed * 0x9e3779b97f4a7c15ULL | 1;
	sigemptyset(&end_signals);
	sigaddset(&end_signals, SIGTERM);
	sigaddset(&end_signals, SIGINT);
	sigprocmask(SIG_BLOCK, &end_signals, NULL);
	link_open();
	read_info();
	splits_before = split_folios;
	while (!ended() && counted.rounds < option.rounds)
		go_round();
	read_info();
	report(split_folios - splits_before);
	return 0;
}
