// SPDX-License-Identifier: MIT
/*
 * One process of a case: private anonymous memory whose every page can be computed again.
 *
 *	workload KIND NUMBER PAGES OPT_IN
 *	workload exec OPT_IN PROGRAM [ARGUMENT ...]
 *
 * C, so that the emulated processors' time goes to who is measured and not to this. KIND says what
 * the pages hold, NUMBER which process this is:
 *
 *	same	page n is the same in every process, and different from all others
 *	few	each 20th page as in "same"; all others are unlike any other page
 *	groups	GROUPS different contents, over and over: every page is a duplicate
 *	churn	as "same"; in the last quarter a counter in each page is increased, between 4 times a
 *		second and once in 4 s, in all processes in step. So they are always equal, and never
 *		for long: what merges them has merged in vain.
 *
 * OPT_IN is what KSM needs to look at memory at all: "prctl" (6.4 and later, for all memory, and
 * programs that are executed inherit it), "madvise", or "none". mergemem needs none.
 *
 * It says "ready ADDRESS" once its memory is filled, and obeys lines on standard input, each
 * answered by a line: "pause MS" (write what is due at that time of the monotonic clock, and no more:
 * processes that are told the same time have equal pages then), and "verify": "ok", or "wrong
 * COUNT". It ends with its standard input.
 */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define DUPLICATE_EVERY 20
#define GROUPS 256
#define CHURN_PART 4
#define PERIODS 5
#define SHORTEST_PERIOD_MS 250
#define TICK_MS 50

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

enum kind { SAME, FEW, GROUPED, CHURN, KINDS };

static const char *const kind_names[KINDS] = { "same", "few", "groups", "churn" };

static enum kind kind;
static uint64_t number, pages;
static uint64_t *memory;
/* Of each page: how often its counter was increased, as it must be now. */
static uint32_t *generations;
static int churning;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ULL + now.tv_nsec / 1000000;
}

/* Equal numbers, equal contents. */
static uint64_t content_of(uint64_t page)
{
	uint64_t mine = (number + 1) << 32 | page;

	switch (kind) {
	case FEW:
		return page % DUPLICATE_EVERY ? mine : page;
	case GROUPED:
		return page % GROUPS;
	default:
		return page;
	}
}

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
	uint64_t mixed = (*state += 0x9e3779b97f4a7c15);

	mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
	mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
	return mixed ^ mixed >> 31;
}

/* Where in a page its counter is: anywhere, or a sample of the page would always meet it. */
static unsigned int counter_word(uint64_t page)
{
	return page * 67 % WORDS;
}

static void fill(uint64_t page)
{
	uint64_t state = content_of(page) * 0xd1342543de82ef95 + 1;
	uint64_t *words = memory + page * WORDS;
	unsigned int i;

	for (i = 0; i < WORDS; i++)
		words[i] = next(&state);
}

static int wrong(uint64_t page)
{
	uint64_t state = content_of(page) * 0xd1342543de82ef95 + 1;
	uint64_t *words = memory + page * WORDS;
	unsigned int i;

	for (i = 0; i < WORDS; i++) {
		uint64_t expected = next(&state);

		if (i == counter_word(page))
			expected += generations[page];
		if (words[i] != expected)
			return 1;
	}
	return 0;
}

static void verify(void)
{
	uint64_t page, found = 0;

	for (page = 0; page < pages; page++)
		found += wrong(page);
	if (found)
		printf("wrong %lu\n", (unsigned long)found);
	else
		puts("ok");
	fflush(stdout);
}

/* Increase the counters that are due. The clock is the same for all processes. */
static void churn(uint64_t now)
{
	uint64_t page;

	for (page = pages - pages / CHURN_PART; page < pages; page++) {
		uint64_t period_ms = SHORTEST_PERIOD_MS << page % PERIODS;
		uint32_t due = (now + page * 7919 % period_ms) / period_ms;

		/* Not a byte is written in vain: that would be a fault, too. Nor back in time. */
		if ((int32_t)(due - generations[page]) <= 0)
			continue;
		memory[page * WORDS + counter_word(page)] += (uint32_t)(due - generations[page]);
		generations[page] = due;
	}
}

static void opt_in(const char *how, void *start, size_t bytes)
{
	if (!strcmp(how, "prctl") && prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
		fail("PR_SET_MEMORY_MERGE");
	if (!strcmp(how, "madvise") && start && madvise(start, bytes, MADV_MERGEABLE))
		fail("MADV_MERGEABLE");
}

static int obey(const char *line)
{
	unsigned long until_ms;

	if (!strcmp(line, "verify\n")) {
		verify();
		return 0;
	}
	if (sscanf(line, "pause %lu", &until_ms) != 1)
		return 1;
	if (churning)
		churn(until_ms);
	churning = 0;
	puts("ok");
	fflush(stdout);
	return 0;
}

int main(int argc, char **argv)
{
	struct pollfd input = { .events = POLLIN };
	uint64_t page;
	char line[64];

	if (argc > 3 && !strcmp(argv[1], "exec")) {
		opt_in(argv[2], NULL, 0);
		execvp(argv[3], argv + 3);
		fail(argv[3]);
	}
	if (argc != 5) {
		fputs("usage: workload KIND NUMBER PAGES OPT_IN\n", stderr);
		return 2;
	}
	while (kind < KINDS && strcmp(kind_names[kind], argv[1]))
		kind++;
	number = strtoul(argv[2], NULL, 10);
	pages = strtoul(argv[3], NULL, 10);
	if (kind == KINDS || !pages)
		return 2;
	memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	generations = mmap(NULL, pages * sizeof(*generations), PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || generations == MAP_FAILED)
		fail("mmap");
	opt_in(argv[4], memory, pages * PAGE_BYTES);
	for (page = 0; page < pages; page++)
		fill(page);
	churning = kind == CHURN;
	printf("ready %lu\n", (unsigned long)memory);
	fflush(stdout);
	/* Unbuffered: poll() must not sleep on a line that stdio has read already. */
	setvbuf(stdin, NULL, _IONBF, 0);
	for (;;) {
		if (churning)
			churn(now_ms());
		if (!poll(&input, 1, churning ? TICK_MS : -1))
			continue;
		if (!fgets(line, sizeof(line), stdin))
			return 0;
		if (obey(line))
			return 2;
	}
}
