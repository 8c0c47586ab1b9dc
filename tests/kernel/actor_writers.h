/* SPDX-License-Identifier: MIT */
/*
 * Threads that write and read at random while memory is merged under their feet, and notice what
 * goes wrong.
 */
#include "actor.h"

#include <pthread.h>

/*
 * Random writers
 *
 * All pages have one content but for a few live words, which are 0 or 1: so there are never more
 * than a few dozen different pages, many are equal at any time, and each write makes a page equal
 * to others again. What each live word must be is kept in a shadow that is never merged:
 *
 *   owned words	have one thread that writes them. Shadow: a version, odd while the write is
 *			under way, and the value. The owner sees at each write that nothing was lost,
 *			the others, seqlock fashion, that nobody reads an old page through a stale TLB
 *			entry after a write to its copy.
 *   the last word	is flipped by all threads, atomically, here and in the shadow. A flip that
 *			went to a page about to vanish shows in the end.
 */
#define OWNED_WORDS 4
#define LIVE_WORDS (OWNED_WORDS + 1)
#define MAX_WRITERS 8
static const unsigned int live_word[LIVE_WORDS] = { 0, 130, 257, 511, 384 };

static struct {
	uint64_t *start;
	uint64_t pages, seed;
	uint64_t *shadow;
	unsigned int threads;
	pthread_t thread[MAX_WRITERS];
	uint64_t writes[MAX_WRITERS], reads[MAX_WRITERS];
	bool stop;
	/* What went wrong first. */
	char wrong[200];
} writers;

static uint64_t *page_word(uint64_t page, unsigned int live)
{
	return writers.start + page * PAGE_WORDS + live_word[live];
}

static uint64_t *shadow_word(uint64_t page, unsigned int live)
{
	return writers.shadow + page * LIVE_WORDS + live;
}

static void wrong(const char *what, uint64_t page, unsigned int live, uint64_t is, uint64_t should)
{
	if (!writers.wrong[0])
		snprintf(writers.wrong, sizeof(writers.wrong),
			 "%s: page %lu word %u is %#lx instead of %#lx",
			 what, page, live_word[live], is, should);
	__atomic_store_n(&writers.stop, true, __ATOMIC_SEQ_CST);
}

/* A write as programs do it, or as the kernel does it for them, with its own faults. */
static void store(uint64_t *to, uint64_t value, int *pipe_of_thread, bool by_kernel)
{
	if (!by_kernel)
		__atomic_store_n(to, value, __ATOMIC_SEQ_CST);
	else if (write(pipe_of_thread[1], &value, 8) != 8 || read(pipe_of_thread[0], to, 8) != 8)
		wrong("pipe", 0, 0, 0, 0);
}

static void write_owned(uint64_t page, unsigned int live, uint64_t random, int *pipe_of_thread)
{
	uint64_t *word = page_word(page, live), *shadow = shadow_word(page, live);
	uint64_t version = *shadow >> 1, should = *shadow & 1;
	uint64_t is = __atomic_load_n(word, __ATOMIC_SEQ_CST);
	/* More zeros than ones: a few contents are common, others rare. */
	uint64_t value = !(random & 3);

	if (is != should)
		return wrong("lost write", page, live, is, should);
	__atomic_store_n(shadow, (version + 1) << 1 | should, __ATOMIC_SEQ_CST);
	store(word, value, pipe_of_thread, !(random >> 2 & 15));
	__atomic_store_n(shadow, (version + 2) << 1 | value, __ATOMIC_SEQ_CST);
}

static void read_owned(uint64_t page, unsigned int live)
{
	uint64_t *shadow = shadow_word(page, live);
	uint64_t before = __atomic_load_n(shadow, __ATOMIC_SEQ_CST);
	uint64_t is = __atomic_load_n(page_word(page, live), __ATOMIC_SEQ_CST);
	uint64_t after = __atomic_load_n(shadow, __ATOMIC_SEQ_CST);

	if (before == after && !(before >> 1 & 1) && is != (before & 1))
		wrong("stale read", page, live, is, before & 1);
}

static void flip(uint64_t page)
{
	__atomic_fetch_xor(shadow_word(page, OWNED_WORDS), 1, __ATOMIC_SEQ_CST);
	__atomic_fetch_xor(page_word(page, OWNED_WORDS), 1, __ATOMIC_SEQ_CST);
}

static void *write_at_random(void *index)
{
	uint64_t self = (uintptr_t)index, state = writers.seed * 2 + self + 1;
	int pipe_of_thread[2];

	if (pipe(pipe_of_thread))
		wrong("pipe", 0, 0, 0, 0);
	while (!__atomic_load_n(&writers.stop, __ATOMIC_SEQ_CST)) {
		uint64_t random = next_random(&state);
		uint64_t page = random % writers.pages;
		unsigned int live = (random >> 32) % LIVE_WORDS;

		random >>= 40;
		if (live == OWNED_WORDS) {
			/* Seldom, lest half of all pages differ in it. */
			if (!(random & 15))
				flip(page);
		} else if ((page + live) % writers.threads == self) {
			write_owned(page, live, random, pipe_of_thread);
			writers.writes[self]++;
		} else {
			read_owned(page, live);
			writers.reads[self]++;
		}
		/* Leave a while in which there is something to merge. */
		if (!(random & 255))
			usleep(1000);
	}
	close(pipe_of_thread[0]);
	close(pipe_of_thread[1]);
	return NULL;
}

/* writers ADDRESS PAGES SEED THREADS: fill the pages, and start writing at random */
static void do_writers(const struct command *command)
{
	size_t shadow_bytes;

	writers.start = pointer(command, 1);
	writers.pages = number(command, 2);
	writers.seed = number(command, 3);
	writers.threads = number(command, 4);
	writers.stop = false;
	writers.wrong[0] = 0;
	shadow_bytes = writers.pages * LIVE_WORDS * sizeof(uint64_t);
	writers.shadow = mmap(NULL, shadow_bytes, PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (writers.shadow == MAP_FAILED || writers.threads > MAX_WRITERS)
		return failed("writers");
	/* Everybody's pages look alike, whatever the seed. */
	fill_pages(writers.start, writers.pages, 1, 1);
	for (uint64_t page = 0; page < writers.pages; page++)
		for (unsigned int live = 0; live < LIVE_WORDS; live++)
			*page_word(page, live) = 0;
	for (uintptr_t i = 0; i < writers.threads; i++)
		pthread_create(&writers.thread[i], NULL, write_at_random, (void *)i);
	done();
}

/* Every byte of every page, once all threads have stopped. */
static void check_writers(void)
{
	for (uint64_t page = 0; page < writers.pages; page++) {
		const uint64_t *words = writers.start + page * PAGE_WORDS;

		for (unsigned int live = 0; live < LIVE_WORDS; live++) {
			uint64_t is = *page_word(page, live), should = *shadow_word(page, live) & 1;

			if (is != should)
				return wrong("in the end", page, live, is, should);
		}
		for (unsigned int word = 0; word < PAGE_WORDS; word++) {
			bool alive = false;

			for (unsigned int live = 0; live < LIVE_WORDS; live++)
				alive |= live_word[live] == word;
			if (!alive && words[word] != content_word(1, 0, word))
				return wrong("a word nobody writes", page, 0, words[word], 0);
		}
	}
}

static uint64_t sum_of_writers(const uint64_t *counts)
{
	uint64_t sum = 0;

	for (unsigned int i = 0; i < writers.threads; i++)
		sum += __atomic_load_n(&counts[i], __ATOMIC_RELAXED);
	return sum;
}

/* writers_so_far: answers as stop_writers does */
static void do_writers_so_far(const struct command *command)
{
	(void)command;
	answer("ok %lu %lu %s", sum_of_writers(writers.writes), sum_of_writers(writers.reads),
	       writers.wrong);
}

/* stop_writers: answers the number of writes and reads, then what was wrong, if anything was */
static void do_stop_writers(const struct command *command)
{
	(void)command;
	__atomic_store_n(&writers.stop, true, __ATOMIC_SEQ_CST);
	for (unsigned int i = 0; i < writers.threads; i++)
		pthread_join(writers.thread[i], NULL);
	if (!writers.wrong[0])
		check_writers();
	answer("ok %lu %lu %s", sum_of_writers(writers.writes), sum_of_writers(writers.reads),
	       writers.wrong);
}
