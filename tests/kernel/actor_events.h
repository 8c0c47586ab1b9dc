/* SPDX-License-Identifier: MIT */
/*
 * What may happen to memory while it is merged: locks, faults that another process handles, memory
 * policies.
 */
#include "actor.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

/* Not defined by the headers of older kernels. */
#ifndef UFFDIO_MOVE
struct uffdio_move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif

/* mlockall FLAGS */
static void do_mlockall(const struct command *command)
{
	done_or_failed(mlockall(number(command, 1)), "mlockall");
}

/* munlockall */
static void do_munlockall(const struct command *command)
{
	(void)command;
	done_or_failed(munlockall(), "munlockall");
}

/* mlock2 ADDRESS PAGES FLAGS */
static void do_mlock2(const struct command *command)
{
	done_or_failed(mlock2(pointer(command, 1), bytes(command, 2), number(command, 3)),
		       "mlock2");
}

/* mbind ADDRESS PAGES MODE NODES FLAGS: NODES is a bitmap */
static void do_mbind(const struct command *command)
{
	unsigned long nodes = number(command, 4);

	done_or_failed(syscall(SYS_mbind, pointer(command, 1), bytes(command, 2),
			       number(command, 3), nodes ? &nodes : NULL, nodes ? 64 : 0,
			       number(command, 5)), "mbind");
}

/* userfaultfd: answers its descriptor; who wants to use it takes a copy of that */
static void do_userfaultfd(const struct command *command)
{
	(void)command;
	done_or_failed(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), "userfaultfd");
}

static struct {
	pthread_t thread;
	volatile unsigned char *at;
	unsigned char byte;
	bool write;
} accessor;

static void *access_once(void *unused)
{
	if (accessor.write)
		*accessor.at = accessor.byte;
	else
		accessor.byte = *accessor.at;
	return unused;
}

/* access ADDRESS [BYTE]: read a byte, or write it, by a thread, which may have to wait for it */
static void do_access(const struct command *command)
{
	accessor.at = pointer(command, 1);
	accessor.write = command->count > 2;
	accessor.byte = number(command, 2);
	errno = pthread_create(&accessor.thread, NULL, access_once, NULL);
	done_or_failed(-errno, "pthread_create");
}

/* accessed: wait for that thread; answers the byte */
static void do_accessed(const struct command *command)
{
	(void)command;
	pthread_join(accessor.thread, NULL);
	answer("ok %u", accessor.byte);
}

/*
 * UFFDIO_MOVE, which moves pages within a process into a range that a userfaultfd watches.
 */
static int64_t move_pages_to(int userfaultfd, char *to, char *from, size_t length)
{
	struct uffdio_move move = {
		.dst = (uintptr_t)to,
		.src = (uintptr_t)from,
		.len = length,
	};

	if (ioctl(userfaultfd, UFFDIO_MOVE, &move))
		return -errno;
	return move.move;
}

/* move USERFAULTFD TO FROM PAGES: answers how many bytes were moved, or the errno, negative */
static void do_move(const struct command *command)
{
	answer("ok %ld", move_pages_to(number(command, 1), pointer(command, 2),
				       pointer(command, 3), bytes(command, 4)));
}

/* Moves: pages that are filled, moved, checked where they went, and discarded */
#define MOVES_PERIOD 4

static struct {
	char *from, *to;
	uint64_t pages, seed, rounds, moved, busy;
	int userfaultfd;
	pthread_t thread;
	bool stop;
	char wrong[100];
} moves;

static const char *move_one(uint64_t page)
{
	char *from = moves.from + page * PAGE_BYTES, *to = moves.to + page * PAGE_BYTES;
	uint64_t content = page % MOVES_PERIOD;
	uint64_t word = content_word(moves.seed, content, 0);
	int64_t moved = move_pages_to(moves.userfaultfd, to, from, PAGE_BYTES);

	/* Shared with somebody: a write gives us our own, and we try again. */
	while (moved == -EBUSY || moved == -EAGAIN) {
		moves.busy += moved == -EBUSY;
		*(volatile uint64_t *)from = word;
		moved = move_pages_to(moves.userfaultfd, to, from, PAGE_BYTES);
		if (__atomic_load_n(&moves.stop, __ATOMIC_SEQ_CST))
			return NULL;
	}
	if (moved != (int64_t)PAGE_BYTES)
		return "neither moved nor busy";
	moves.moved++;
	for (uint64_t i = 0; i < PAGE_WORDS; i++)
		if (((volatile uint64_t *)to)[i] != content_word(moves.seed, content, i))
			return "after the move";
	return NULL;
}

static void *move_again_and_again(void *unused)
{
	while (!__atomic_load_n(&moves.stop, __ATOMIC_SEQ_CST) && !moves.wrong[0]) {
		fill_pages(moves.from, moves.pages, moves.seed, MOVES_PERIOD);
		/* Leave a while in which there is something to merge. */
		usleep(20000);
		if (find_difference(moves.from, moves.pages, moves.seed, MOVES_PERIOD) >= 0)
			strcpy(moves.wrong, "after filling");
		for (uint64_t page = 0; page < moves.pages && !moves.wrong[0]; page++) {
			const char *where = move_one(page);

			if (where)
				strcpy(moves.wrong, where);
		}
		madvise(moves.to, moves.pages * PAGE_BYTES, MADV_DONTNEED);
		moves.rounds++;
	}
	return unused;
}

/* moves USERFAULTFD TO FROM PAGES SEED */
static void do_moves(const struct command *command)
{
	moves.userfaultfd = number(command, 1);
	moves.to = pointer(command, 2);
	moves.from = pointer(command, 3);
	moves.pages = number(command, 4);
	moves.seed = number(command, 5);
	moves.rounds = moves.moved = moves.busy = 0;
	moves.stop = false;
	moves.wrong[0] = 0;
	errno = pthread_create(&moves.thread, NULL, move_again_and_again, NULL);
	done_or_failed(-errno, "pthread_create");
}

/* moves_so_far: answers as stop_moves does */
static void do_moves_so_far(const struct command *command)
{
	(void)command;
	answer("ok %lu %lu %lu %s", __atomic_load_n(&moves.rounds, __ATOMIC_RELAXED),
	       __atomic_load_n(&moves.moved, __ATOMIC_RELAXED),
	       __atomic_load_n(&moves.busy, __ATOMIC_RELAXED), moves.wrong);
}

/* stop_moves: answers rounds, pages moved, pages found busy, then what was wrong, if anything was */
static void do_stop_moves(const struct command *command)
{
	(void)command;
	__atomic_store_n(&moves.stop, true, __ATOMIC_SEQ_CST);
	pthread_join(moves.thread, NULL);
	answer("ok %lu %lu %lu %s", moves.rounds, moves.moved, moves.busy, moves.wrong);
}

/* One line of the actor's table. */
#define EVENT_COMMANDS				\
	{ "mlockall", do_mlockall },		\
	{ "munlockall", do_munlockall },	\
	{ "mlock2", do_mlock2 },		\
	{ "mbind", do_mbind },			\
	{ "userfaultfd", do_userfaultfd },	\
	{ "access", do_access },		\
	{ "accessed", do_accessed },		\
	{ "move", do_move },			\
	{ "moves", do_moves },			\
	{ "moves_so_far", do_moves_so_far },	\
	{ "stop_moves", do_stop_moves }
