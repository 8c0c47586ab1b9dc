/* SPDX-License-Identifier: MIT */
/*
 * Mapping, filling, checking and changing memory.
 */
#include "actor.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#define HUGE_BYTES (2UL << 20)

/* Not defined by older C libraries. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/*
 * Each mapping is cut out of a larger inaccessible one, so that no two of them ever become one, and
 * starts at the beginning of a page table.
 */
static void *reserve(size_t length)
{
	char *start = mmap(NULL, length + 2 * HUGE_BYTES, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (start == MAP_FAILED)
		return NULL;
	return (void *)(((uintptr_t)start + HUGE_BYTES) & -HUGE_BYTES);
}

static int open_backing(const char *kind, const char *path, size_t length)
{
	int file = -1;

	if (!strcmp(kind, "memfd"))
		file = memfd_create("actor", 0);
	else if (!strcmp(kind, "file"))
		file = open(path, O_RDWR | O_CREAT, 0600);
	if (file >= 0 && ftruncate(file, length)) {
		close(file);
		file = -1;
	}
	return file;
}

/*
 * map PAGES KIND [PATH]: private, never huge; or huge, shared, hugetlb, or default, with nothing
 * said about its size; or private mappings of memfd, or of the file at PATH; answers the address
 */
static void do_map(const struct command *command)
{
	size_t length = bytes(command, 1);
	const char *kind = command->count > 2 ? command->word[2] : "private";
	bool hugetlb = !strcmp(kind, "hugetlb"), shared = !strcmp(kind, "shared");
	bool backed = !strcmp(kind, "memfd") || !strcmp(kind, "file");
	int flags = MAP_FIXED | (shared ? MAP_SHARED : MAP_PRIVATE), file = -1;
	void *start = reserve(length), *mapped;

	if (!start)
		return failed("reserve");
	if (backed)
		file = open_backing(kind, command->word[3], length);
	else
		flags |= MAP_ANONYMOUS | (hugetlb ? MAP_HUGETLB : 0);
	mapped = mmap(start, length, PROT_READ | PROT_WRITE, flags, file, 0);
	if (file >= 0)
		close(file);
	if (mapped == MAP_FAILED)
		return failed("mmap");
	if (!hugetlb && !backed && strcmp(kind, "default"))
		madvise(start, length, strcmp(kind, "huge") ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
	answer("ok %lu", (uintptr_t)start);
}

/* fill ADDRESS PAGES SEED [PERIOD] */
static void do_fill(const struct command *command)
{
	fill_pages(pointer(command, 1), number(command, 2), number(command, 3), number(command, 4));
	done();
}

/* verify ADDRESS PAGES SEED [PERIOD]: answers "same", or the first word that differs */
static void do_verify(const struct command *command)
{
	const uint64_t *start = pointer(command, 1);
	uint64_t period = number(command, 4), page, word;
	int64_t index = find_difference(start, number(command, 2), number(command, 3), period);

	if (index < 0)
		return answer("ok same");
	page = index / PAGE_WORDS;
	word = index % PAGE_WORDS;
	answer("ok page %lu byte %lu is %#lx instead of %#lx", page, word * 8, start[index],
	       content_word(number(command, 3), period ? page % period : page, word));
}

/* zeros ADDRESS PAGES: answers whether they are */
static void do_zeros(const struct command *command)
{
	answer("ok %d", is_zero(pointer(command, 1), number(command, 2)));
}

/* touch ADDRESS PAGES: read one byte of each */
static void do_touch(const struct command *command)
{
	const volatile char *start = pointer(command, 1);

	for (size_t at = 0; at < bytes(command, 2); at += PAGE_BYTES)
		(void)start[at];
	done();
}

/* read ADDRESS: answers the byte there */
static void do_read(const struct command *command)
{
	answer("ok %u", *(const volatile unsigned char *)pointer(command, 1));
}

/* write ADDRESS VALUE [PAGES]: one byte there, and at the same place of the pages that follow */
static void do_write(const struct command *command)
{
	volatile unsigned char *to = pointer(command, 1);
	uint64_t pages = command->count > 3 ? number(command, 3) : 1;

	for (uint64_t page = 0; page < pages; page++)
		to[page * PAGE_BYTES] = number(command, 2);
	done();
}

/* flip ADDRESS PAGES STEP: all bits of the first byte of every STEPth page */
static void do_flip(const struct command *command)
{
	volatile unsigned char *bytes_of = pointer(command, 1);

	for (uint64_t page = 0; page < number(command, 2); page += number(command, 3))
		bytes_of[page * PAGE_BYTES] ^= 0xff;
	done();
}

/* clear ADDRESS PAGES: write zeros */
static void do_clear(const struct command *command)
{
	memset(pointer(command, 1), 0, bytes(command, 2));
	done();
}

/* munmap ADDRESS PAGES */
static void do_munmap(const struct command *command)
{
	done_or_failed(munmap(pointer(command, 1), bytes(command, 2)), "munmap");
}

/* mremap ADDRESS PAGES NEW_PAGES FLAGS [NEW_ADDRESS]: answers the address */
static void do_mremap(const struct command *command)
{
	void *moved = mremap(pointer(command, 1), bytes(command, 2), bytes(command, 3),
			     number(command, 4), pointer(command, 5));

	if (moved == MAP_FAILED)
		return failed("mremap");
	answer("ok %lu", (uintptr_t)moved);
}

/* mprotect ADDRESS PAGES PROTECTION */
static void do_mprotect(const struct command *command)
{
	done_or_failed(mprotect(pointer(command, 1), bytes(command, 2), number(command, 3)),
		       "mprotect");
}

/* madvise ADDRESS PAGES ADVICE */
static void do_madvise(const struct command *command)
{
	done_or_failed(madvise(pointer(command, 1), bytes(command, 2), number(command, 3)),
		       "madvise");
}

/* mlock ADDRESS PAGES */
static void do_mlock(const struct command *command)
{
	done_or_failed(mlock(pointer(command, 1), bytes(command, 2)), "mlock");
}

/* munlock ADDRESS PAGES */
static void do_munlock(const struct command *command)
{
	done_or_failed(munlock(pointer(command, 1), bytes(command, 2)), "munlock");
}

/* userfault ADDRESS PAGES: register them, for as long as we live; nobody ever reads the events */
static void do_userfault(const struct command *command)
{
	int descriptor = syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { .start = number(command, 1), .len = bytes(command, 2) },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (descriptor < 0 || ioctl(descriptor, UFFDIO_API, &api))
		return failed("userfaultfd");
	done_or_failed(ioctl(descriptor, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
}
