/* SPDX-License-Identifier: MIT */
/*
 * The storm: threads that do everything to their memory that core mm knows how to handle, and check
 * every byte against a shadow, while others merge and unmerge the same pages.
 *
 * Each thread has a part of the mapping to itself. A page has one of a few contents, of which the
 * shadow holds the number, so many pages are equal at any time, in all processes. Contents and
 * shadow are in shared mappings, which are never merged: what checks must not depend on it.
 */
#include "actor.h"

#include <pthread.h>
#include <sys/uio.h>
#include <sys/wait.h>

/* Content 0 is zeros. */
#define STORM_CONTENTS 5
#define STORM_MAX_THREADS 8

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

struct storm_part {
	pthread_t thread;
	uint64_t random, rounds;
	char *start, *away;
	uint8_t *shadow;
	uint64_t pages;
	/* The last that was given about huge pages. */
	int advice;
	/* Shared with our children. */
	bool *child_good;
	int pipe[2];
};

static struct {
	uint64_t (*content)[PAGE_WORDS];
	struct storm_part part[STORM_MAX_THREADS];
	unsigned int threads;
	bool stop;
	/* What went wrong first. */
	char wrong[200];
} storm;

/* Pages of a part that one round is about. */
struct storm_range {
	uint64_t first, pages;
	char *start;
	size_t length;
};

static void storm_wrong(const char *what, uint64_t page, uint64_t is, uint64_t should)
{
	if (!storm.wrong[0])
		snprintf(storm.wrong, sizeof(storm.wrong), "%s: page %lu has %#lx instead of %#lx",
			 what, page, is, should);
	__atomic_store_n(&storm.stop, true, __ATOMIC_SEQ_CST);
}

static bool storm_verify(const struct storm_part *part, const char *at, uint64_t first,
			 uint64_t pages, const char *what)
{
	for (uint64_t page = first; page < first + pages; page++) {
		const uint64_t *should = storm.content[part->shadow[page]];
		const uint64_t *is = (const uint64_t *)(at + page * PAGE_BYTES);

		if (!memcmp(is, should, PAGE_BYTES))
			continue;
		for (unsigned int word = 0; word < PAGE_WORDS; word++)
			if (is[word] != should[word]) {
				storm_wrong(what, page, is[word], should[word]);
				break;
			}
		return false;
	}
	return true;
}

/* A new content for each page; `by_kernel`: copied by the kernel, which takes the faults. */
static void storm_fill(struct storm_part *part, const struct storm_range *range, bool by_kernel)
{
	for (uint64_t page = range->first; page < range->first + range->pages; page++) {
		uint8_t content = next_random(&part->random) % STORM_CONTENTS;
		struct iovec from = { storm.content[content], PAGE_BYTES };
		struct iovec to = { part->start + page * PAGE_BYTES, PAGE_BYTES };

		part->shadow[page] = content;
		if (!by_kernel)
			memcpy(to.iov_base, from.iov_base, PAGE_BYTES);
		else if (process_vm_writev(getpid(), &from, 1, &to, 1, 0) != PAGE_BYTES)
			storm_wrong("process_vm_writev", page, errno, 0);
	}
}

static void storm_refill(struct storm_part *part, const struct storm_range *range)
{
	storm_fill(part, range, next_random(&part->random) % 4 == 0);
}

/* One word of each page there and back: each page is private for a moment. */
static void storm_poke(struct storm_part *part, const struct storm_range *range)
{
	unsigned int word = next_random(&part->random) % PAGE_WORDS;

	for (uint64_t page = range->first; page < range->first + range->pages; page++) {
		volatile uint64_t *to = (uint64_t *)(part->start + page * PAGE_BYTES) + word;
		uint64_t should = storm.content[part->shadow[page]][word];

		if (*to != should)
			storm_wrong("before a write", page, *to, should);
		*to = ~should;
		if (*to != ~should)
			storm_wrong("lost write", page, *to, ~should);
		*to = should;
	}
}

static void storm_dontneed(struct storm_part *part, const struct storm_range *range)
{
	madvise(range->start, range->length, MADV_DONTNEED);
	memset(part->shadow + range->first, 0, range->pages);
}

/*
 * Each page may be gone at any time until it is written to; a write says which of both it was, and
 * no other than the old content or zeros may be behind it.
 */
static void storm_free(struct storm_part *part, const struct storm_range *range)
{
	madvise(range->start, range->length, MADV_FREE);
	if (next_random(&part->random) % 4 == 0)
		madvise(range->start, range->length, MADV_PAGEOUT);
	for (uint64_t page = range->first; page < range->first + range->pages; page++) {
		uint64_t *words = (uint64_t *)(part->start + page * PAGE_BYTES);
		uint64_t last = PAGE_WORDS - 1;

		__atomic_store_n(&words[0], 1, __ATOMIC_SEQ_CST);
		/* The last word of no content but zeros is 0. */
		if (!words[last])
			part->shadow[page] = 0;
		words[0] = storm.content[part->shadow[page]][0];
	}
}

static void storm_move(struct storm_part *part, const struct storm_range *range)
{
	char *away = part->away + range->first * PAGE_BYTES;
	const int flags = MREMAP_MAYMOVE | MREMAP_FIXED;

	if (mremap(range->start, range->length, range->length, flags, away) == MAP_FAILED) {
		/* More than one mapping at the moment; nothing was moved. */
		if (errno != EFAULT)
			storm_wrong("mremap", range->first, errno, 0);
		return;
	}
	storm_verify(part, part->away, range->first, range->pages, "moved away");
	if (mremap(away, range->length, range->length, flags, range->start) == MAP_FAILED)
		storm_wrong("mremap back", range->first, errno, 0);
}

static void storm_unmap(struct storm_part *part, const struct storm_range *range)
{
	munmap(range->start, range->length);
	if (mmap(range->start, range->length, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
		storm_wrong("mmap", range->first, errno, 0);
	/* Like its neighbours, so that they become one mapping. */
	madvise(range->start, range->length, part->advice);
	memset(part->shadow + range->first, 0, range->pages);
}

static void storm_protect(struct storm_part *part, const struct storm_range *range)
{
	mprotect(range->start, range->length, PROT_NONE);
	mprotect(range->start, range->length, PROT_READ);
	storm_verify(part, part->start, range->first, range->pages, "read-only");
	mprotect(range->start, range->length, PROT_READ | PROT_WRITE);
}

/*
 * The whole part becomes huge pages, or may no longer be made such. Where they are not to be made of
 * what is there, they come with the faults on what is not.
 */
static void storm_huge(struct storm_part *part, const struct storm_range *range)
{
	size_t length = part->pages * PAGE_BYTES;

	part->advice = range->first & 3 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
	madvise(part->start, length, part->advice);
	if (part->advice == MADV_HUGEPAGE)
		madvise(part->start, length, MADV_COLLAPSE);
}

static void storm_page_out(struct storm_part *part, const struct storm_range *range)
{
	(void)part;
	madvise(range->start, range->length, MADV_PAGEOUT);
}

/* A child that reads, writes and reads, and exits, or executes a program: this one, which ends. */
static void storm_child(struct storm_part *part, const struct storm_range *range)
{
	pid_t child;

	*part->child_good = false;
	child = fork();
	if (!child) {
		bool good = storm_verify(part, part->start, 0, part->pages, "in a child");

		/* Ours alone: the shadow is shared with the parent. */
		for (uint64_t page = range->first; page < range->first + range->pages; page++)
			memset(part->start + page * PAGE_BYTES, 0x5a, PAGE_BYTES);
		for (size_t at = 0; at < range->length; at++)
			good &= range->start[at] == 0x5a;
		*part->child_good = good;
		if (range->first & 1)
			execl("/proc/self/exe", "actor", NULL);
		_exit(0);
	}
	/* Children are reaped by themselves: waiting ends, without a status, when it is gone. */
	while (child > 0 && waitpid(child, NULL, 0) > 0)
		;
	if (child > 0 && !*part->child_good)
		storm_wrong("in a child", range->first, 0, 1);
}

/* In use by I/O for a moment: not merged then. What the pipe has must be what the page had. */
static void storm_splice(struct storm_part *part, const struct storm_range *range)
{
	struct iovec lent = { range->start, PAGE_BYTES };
	static __thread char got[PAGE_BYTES];
	uint8_t content = part->shadow[range->first];

	if (vmsplice(part->pipe[1], &lent, 1, 0) != PAGE_BYTES)
		return storm_wrong("vmsplice", range->first, errno, 0);
	usleep(2000);
	if (read(part->pipe[0], got, PAGE_BYTES) != PAGE_BYTES ||
	    memcmp(got, storm.content[content], PAGE_BYTES))
		storm_wrong("out of a pipe", range->first, errno, content);
}

static const struct {
	const char *name;
	void (*act)(struct storm_part *part, const struct storm_range *range);
} storm_acts[] = {
	{ "after filling", storm_refill },
	{ "after filling", storm_refill },
	{ "after filling", storm_refill },
	{ "after single writes", storm_poke },
	{ "after single writes", storm_poke },
	{ "after MADV_DONTNEED", storm_dontneed },
	{ "after MADV_FREE", storm_free },
	{ "after mremap", storm_move },
	{ "after munmap", storm_unmap },
	{ "after mprotect", storm_protect },
	{ "after MADV_HUGEPAGE", storm_huge },
	{ "after MADV_PAGEOUT", storm_page_out },
	{ "after a child", storm_child },
	{ "after vmsplice", storm_splice },
};

static void *storm_on(void *context)
{
	struct storm_part *part = context;

	while (!__atomic_load_n(&storm.stop, __ATOMIC_SEQ_CST)) {
		uint64_t random = next_random(&part->random);
		unsigned int n = random % (sizeof(storm_acts) / sizeof(storm_acts[0]));
		uint64_t first = (random >> 8) % part->pages;
		uint64_t pages = 1 + (random >> 24) % (part->pages - first);
		struct storm_range range = {
			first, pages, part->start + first * PAGE_BYTES, pages * PAGE_BYTES,
		};

		storm_acts[n].act(part, &range);
		storm_verify(part, part->start, first, pages, storm_acts[n].name);
		/* A while in which there is something to merge; then all must be as it was. */
		usleep(random >> 40 & 4095);
		if (!(random >> 56 & 3))
			storm_verify(part, part->start, 0, part->pages, "later");
		part->rounds++;
	}
	storm_verify(part, part->start, 0, part->pages, "in the end");
	return NULL;
}

static void *storm_shared(size_t length)
{
	return mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static bool storm_prepare(struct storm_part *part, char *start, uint64_t pages, uint64_t seed)
{
	size_t length = pages * PAGE_BYTES;

	*part = (struct storm_part){ .start = start, .pages = pages, .random = seed };
	part->advice = MADV_HUGEPAGE;
	part->away = reserve(length);
	part->shadow = storm_shared(pages);
	part->child_good = storm_shared(PAGE_BYTES);
	/* What is there already is not ours to judge. */
	madvise(start, length, MADV_DONTNEED);
	return part->away && part->shadow != MAP_FAILED &&
	       (void *)part->child_good != MAP_FAILED && !pipe(part->pipe);
}

/* storm ADDRESS PAGES SEED THREADS: each has PAGES / THREADS pages */
static void do_storm(const struct command *command)
{
	uint64_t pages, seed = number(command, 3);

	storm.threads = number(command, 4);
	pages = number(command, 2) / storm.threads;
	storm.stop = false;
	storm.wrong[0] = 0;
	storm.content = storm_shared(STORM_CONTENTS * PAGE_BYTES);
	if (storm.content == MAP_FAILED || storm.threads > STORM_MAX_THREADS)
		return failed("storm");
	/* The same in all processes; content 0 stays zeros. */
	fill_pages(storm.content[1], STORM_CONTENTS - 1, 1, 0);
	for (unsigned int i = 0; i < storm.threads; i++) {
		struct storm_part *part = &storm.part[i];
		char *start = (char *)pointer(command, 1) + i * pages * PAGE_BYTES;

		if (!storm_prepare(part, start, pages, seed * STORM_MAX_THREADS + i + 1))
			return failed("storm");
	}
	for (unsigned int i = 0; i < storm.threads; i++)
		pthread_create(&storm.part[i].thread, NULL, storm_on, &storm.part[i]);
	done();
}

/* storm_so_far: answers what was wrong, if anything was */
static void do_storm_so_far(const struct command *command)
{
	(void)command;
	answer("ok %s", storm.wrong);
}

/* stop_storm: answers the number of rounds, then what was wrong, if anything was */
static void do_stop_storm(const struct command *command)
{
	uint64_t rounds = 0;

	(void)command;
	__atomic_store_n(&storm.stop, true, __ATOMIC_SEQ_CST);
	for (unsigned int i = 0; i < storm.threads; i++) {
		pthread_join(storm.part[i].thread, NULL);
		rounds += storm.part[i].rounds;
	}
	answer("ok %lu %s", rounds, storm.wrong);
}
