/* SPDX-License-Identifier: MIT */
/*
 * What the parts of the actor share: the protocol, and what pages are filled with.
 */
#ifndef ACTOR_H
#define ACTOR_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_BYTES 4096UL
#define PAGE_WORDS (PAGE_BYTES / sizeof(uint64_t))

/* One command: its words, the verb first. */
struct command {
	int count;
	char *word[16];
};

/* Every command is answered by one line: "ok ..." or "error ERRNO WHAT". */
static void answer(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void done(void)
{
	answer("ok");
}

static void failed(const char *what)
{
	answer("error %d %s", errno, what);
}

static void done_or_failed(long result, const char *what)
{
	if (result < 0)
		failed(what);
	else
		answer("ok %ld", result);
}

/* A number of the command; 0 where it has no such word. */
static uint64_t number(const struct command *command, int index)
{
	return index < command->count ? strtoull(command->word[index], NULL, 0) : 0;
}

static void *pointer(const struct command *command, int index)
{
	return (void *)(uintptr_t)number(command, index);
}

static size_t bytes(const struct command *command, int index)
{
	return number(command, index) * PAGE_BYTES;
}

/*
 * Word `word` of page `page` of a content. Every page of a content is unlike all others; a period
 * makes page n equal to page n % period. `content` in actor.py is the same function.
 */
static uint64_t content_word(uint64_t seed, uint64_t page, uint64_t word)
{
	uint64_t x = seed * 0x9e3779b97f4a7c15 + page * 0xd1b54a32d192ed03 + word;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static void fill_pages(void *start, uint64_t pages, uint64_t seed, uint64_t period)
{
	uint64_t *to = start;

	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t word = 0; word < PAGE_WORDS; word++)
			*to++ = content_word(seed, period ? page % period : page, word);
}

/* Where pages differ from a content: the index of the first such word, or -1. */
static int64_t find_difference(const void *start, uint64_t pages, uint64_t seed, uint64_t period)
{
	const volatile uint64_t *from = start;

	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t word = 0; word < PAGE_WORDS; word++)
			if (*from++ != content_word(seed, period ? page % period : page, word))
				return page * PAGE_WORDS + word;
	return -1;
}

static bool is_zero(const void *start, uint64_t pages)
{
	const volatile uint64_t *from = start;

	for (uint64_t word = 0; word < pages * PAGE_WORDS; word++)
		if (from[word])
			return false;
	return true;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

#endif
