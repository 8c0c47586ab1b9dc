/* SPDX-License-Identifier: MIT */
/*
 * Threads that change mappings while they are merged, and one that keeps mmap_lock to itself.
 */
#include "actor.h"

#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>

/*
 * Churn: mappings that come and go, move, are forked and discarded, while they are merged
 */
static struct {
	char *start;
	uint64_t pages, period, rounds;
	pthread_t thread;
	bool stop;
	/* Shared with our children. */
	bool *child_good;
	char wrong[100];
} churn;

#define CHURN_PERIOD 4

static bool churned_well(void *start, uint64_t seed)
{
	return find_difference(start, churn.pages, seed, CHURN_PERIOD) < 0;
}

/* A child that reads, writes and reads, then vanishes; true if all it saw was right. */
static bool churn_child(uint64_t seed)
{
	pid_t child;

	*churn.child_good = false;
	child = fork();
	if (!child) {
		bool good = churned_well(churn.start, seed);

		fill_pages(churn.start, churn.pages, seed + 1, CHURN_PERIOD);
		*churn.child_good = good && churned_well(churn.start, seed + 1);
		_exit(0);
	}
	/* Children are reaped by themselves: waiting ends, without a status, when it is gone. */
	while (waitpid(child, NULL, 0) > 0)
		;
	return *churn.child_good;
}

static const char *churn_once(uint64_t seed, unsigned int way)
{
	size_t length = churn.pages * PAGE_BYTES;
	char *away;

	fill_pages(churn.start, churn.pages, seed, CHURN_PERIOD);
	sched_yield();
	if (!churned_well(churn.start, seed))
		return "after filling";
	switch (way) {
	case 0:
		madvise(churn.start, length, MADV_DONTNEED);
		return is_zero(churn.start, churn.pages) ? NULL : "after MADV_DONTNEED";
	case 1:
		away = mremap(churn.start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
			      churn.start + 2 * length);
		if (away == MAP_FAILED || !churned_well(away, seed))
			return "after mremap";
		if (mremap(away, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, churn.start) ==
		    MAP_FAILED || !churned_well(churn.start, seed))
			return "after mremap back";
		return NULL;
	case 2:
		munmap(churn.start, length);
		if (mmap(churn.start, length, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			return "mmap";
		madvise(churn.start, length, MADV_NOHUGEPAGE);
		return is_zero(churn.start, churn.pages) ? NULL : "after munmap";
	case 3:
		mprotect(churn.start, length, PROT_NONE);
		mprotect(churn.start, length, PROT_READ);
		if (!churned_well(churn.start, seed))
			return "after mprotect";
		mprotect(churn.start, length, PROT_READ | PROT_WRITE);
		return NULL;
	default:
		if (!churn_child(seed))
			return "in a child";
		return churned_well(churn.start, seed) ? NULL : "after a child's writes";
	}
}

static void *churn_memory(void *unused)
{
	uint64_t state = 88172645463325252;

	while (!__atomic_load_n(&churn.stop, __ATOMIC_SEQ_CST) && !churn.wrong[0]) {
		uint64_t random = next_random(&state);
		const char *where = churn_once(random % 3, random / 3 % 5);

		if (where)
			snprintf(churn.wrong, sizeof(churn.wrong), "%s", where);
		churn.rounds++;
	}
	return unused;
}

/* churn ADDRESS PAGES: of a mapping of three times as many */
static void do_churn(const struct command *command)
{
	churn.start = pointer(command, 1);
	churn.pages = number(command, 2);
	churn.rounds = 0;
	churn.child_good = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE,
				MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (churn.child_good == MAP_FAILED)
		return failed("mmap");
	churn.stop = false;
	churn.wrong[0] = 0;
	errno = pthread_create(&churn.thread, NULL, churn_memory, NULL);
	done_or_failed(-errno, "pthread_create");
}

/* churn_so_far: answers as stop_churn does */
static void do_churn_so_far(const struct command *command)
{
	(void)command;
	answer("ok %lu %s", __atomic_load_n(&churn.rounds, __ATOMIC_RELAXED), churn.wrong);
}

/* stop_churn: answers the number of rounds, then what was wrong, if anything was */
static void do_stop_churn(const struct command *command)
{
	(void)command;
	__atomic_store_n(&churn.stop, true, __ATOMIC_SEQ_CST);
	pthread_join(churn.thread, NULL);
	answer("ok %lu %s", churn.rounds, churn.wrong);
}

/*
 * The hog: holds mmap_lock for writing nearly all of the time. mprotect takes it while it changes
 * every entry of 1 GiB of page tables, all of which map the zero page.
 */
#define HOG_BYTES (1UL << 30)

static struct {
	char *start;
	pthread_t thread;
	bool stop;
} hog;

static void *hog_lock(void *unused)
{
	while (!__atomic_load_n(&hog.stop, __ATOMIC_SEQ_CST)) {
		mprotect(hog.start, HOG_BYTES, PROT_READ | PROT_WRITE);
		mprotect(hog.start, HOG_BYTES, PROT_READ);
	}
	return unused;
}

/* hog */
static void do_hog(const struct command *command)
{
	(void)command;
	hog.start = mmap(NULL, HOG_BYTES, PROT_READ,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (hog.start == MAP_FAILED)
		return failed("mmap");
	madvise(hog.start, HOG_BYTES, MADV_NOHUGEPAGE);
	madvise(hog.start, HOG_BYTES, MADV_POPULATE_READ);
	hog.stop = false;
	errno = pthread_create(&hog.thread, NULL, hog_lock, NULL);
	done_or_failed(-errno, "pthread_create");
}

/* stop_hog */
static void do_stop_hog(const struct command *command)
{
	(void)command;
	__atomic_store_n(&hog.stop, true, __ATOMIC_SEQ_CST);
	pthread_join(hog.thread, NULL);
	munmap(hog.start, HOG_BYTES);
	done();
}
