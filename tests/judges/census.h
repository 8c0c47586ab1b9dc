/* SPDX-License-Identifier: MIT */
/*
 * All pages of the family, by checksum: which seem to be equal.
 */
#ifndef CENSUS_H
#define CENSUS_H

#include "family.h"

/* More than a guest has memory for. */
#define MAX_PAGES (1 << 20)
#define SEEN_SLOTS (1 << 22)
#define WHOLE_ADDRESS_SPACE (1UL << 47)
#define PAGE_BYTES 4096UL

struct page {
	uint64_t checksum;
	uint64_t address;
	uint32_t uid;
	uint16_t member;
	uint16_t state;
};

static struct page *pages;
static unsigned int page_count;
/* How often a checksum has come, up to 2. */
static uint8_t *often;

/* What the random number generator of a round, and of the whole run, started from. */
static uint64_t random_state;

static uint32_t random_below(uint32_t limit)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return limit ? (random_state >> 11) % limit : 0;
}

static uint8_t *slot_of(const struct page *page)
{
	/* The checksum is as good as random. */
	return &often[(page->checksum ^ page->uid * 0x9e3779b9U) % SEEN_SLOTS];
}

static unsigned int current_member;

static void keep_records(const struct nlattr *attributes, size_t bytes)
{
	size_t length, unused;
	const struct mergemem_record *records =
		find(attributes, bytes, MERGEMEM_A_RECORDS, &length);
	const uint64_t *address = find(attributes, bytes, MERGEMEM_A_ADDRESS, &unused);

	if (!records || !address)
		return;
	for (size_t i = 0; i < length / sizeof(*records) && page_count < MAX_PAGES; i++) {
		struct page *page = &pages[page_count];
		uint8_t *slot;

		if (!records[i].map_count)
			continue;
		page->checksum = records[i].checksum;
		page->address = *address + i * PAGE_BYTES;
		page->uid = members[current_member].uid;
		page->member = current_member;
		page->state = records[i].state;
		slot = slot_of(page);
		*slot += *slot < 2;
		page_count++;
	}
}

/* Read one process, or a part of it: 0 or a negative errno. */
static int census_of(unsigned int member)
{
	current_member = member;
	request_begin(MERGEMEM_CMD_CHECKSUM, NLM_F_DUMP);
	put(MERGEMEM_A_PROCESSES, &members[member].process, sizeof(struct mergemem_process));
	put_u64(MERGEMEM_A_ADDRESS, PAGE_BYTES);
	put_u64(MERGEMEM_A_PAGES, WHOLE_ADDRESS_SPACE / PAGE_BYTES - 2);
	put_u32(MERGEMEM_A_DEPTH, MERGEMEM_DEPTH_FULL_BYTES);
	return request_send(keep_records);
}

static void census_begin(void)
{
	if (!pages) {
		pages = malloc(MAX_PAGES * sizeof(*pages));
		often = malloc(SEEN_SLOTS);
	}
	if (!pages || !often)
		give_up("memory");
	memset(often, 0, SEEN_SLOTS);
	page_count = 0;
}

static uint64_t salt;

/* By user and checksum; within a group in an order of this round. */
static int compare(const void *left, const void *right)
{
	const struct page *a = left, *b = right;
	uint64_t x = (a->address + a->member) ^ salt, y = (b->address + b->member) ^ salt;

	if (a->uid != b->uid)
		return a->uid < b->uid ? -1 : 1;
	if (a->checksum != b->checksum)
		return a->checksum < b->checksum ? -1 : 1;
	return (x > y) - (x < y);
}

/* Drop the pages that nothing seems to equal, and put the others next to their like. */
static void census_sort(void)
{
	unsigned int kept = 0;

	for (unsigned int i = 0; i < page_count; i++)
		if (*slot_of(&pages[i]) > 1 || pages[i].state == MERGEMEM_STATE_ZERO)
			pages[kept++] = pages[i];
	page_count = kept;
	salt = (uint64_t)random_below(1 << 16) * PAGE_BYTES;
	qsort(pages, page_count, sizeof(*pages), compare);
}

#endif
