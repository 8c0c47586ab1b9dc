/* SPDX-License-Identifier: MIT */
/*
 * One request of MERGE after the other: filled up, sent, its results counted.
 */
#ifndef BATCH_H
#define BATCH_H

#include "census.h"

#define RESULTS 32
#define MAX_ERRNO 134

static struct {
	bool zero, split, plant;
	uint64_t seed, rounds;
} option = { .zero = true, .split = true, .seed = 1, .rounds = UINT64_MAX };

static struct {
	uint64_t rounds, members, read_pages, requests, candidates, blind_candidates;
	uint64_t results[RESULTS];
	uint64_t unmerge_requests, unmerged_pages, planted, peak_shared_mappings;
	uint64_t errors[MAX_ERRNO];
} counted;

/* One request of MERGE while it grows. */
static struct {
	struct mergemem_process processes[MERGEMEM_MAX_PROCESSES];
	struct mergemem_candidate candidates[MERGEMEM_MAX_CANDIDATES];
	const struct page *pages[MERGEMEM_MAX_CANDIDATES];
	uint32_t process_count, count, groups;
	/* Index of a member in processes, plus 1. */
	uint16_t index[MAX_FAMILY];
} batch;

/* A process that has gone or must not be touched now is no news; all else is a fault. */
static void tolerate(int error, const char *what)
{
	if (!error)
		return;
	if (error != -ESRCH && error != -EACCES && error != -EBUSY && error != -EINTR &&
	    error != -ENOMEM) {
		fprintf(stderr, "merger: %s: %s: %s\n", what, strerror(-error), channel.text);
		exit(1);
	}
	counted.errors[-error]++;
}

/* Flip a byte of a page that has just been merged. */
static void plant(const struct page *page)
{
	char path[32];
	uint8_t byte;
	off_t where = page->address + random_below(PAGE_BYTES);
	int memory;

	snprintf(path, sizeof(path), "/proc/%u/mem", members[page->member].process.pid);
	memory = open(path, O_RDWR | O_CLOEXEC);
	if (memory < 0)
		return;
	if (pread(memory, &byte, 1, where) == 1) {
		byte ^= 0xff;
		counted.planted += pwrite(memory, &byte, 1, where) == 1;
	}
	close(memory);
}

static void keep_results(const struct nlattr *attributes, size_t bytes)
{
	size_t length;
	const uint8_t *results = find(attributes, bytes, MERGEMEM_A_RESULTS, &length);
	uint32_t planted = random_below(batch.count);

	if (length != batch.count) {
		fprintf(stderr, "merger: %zu results for %u candidates\n", length, batch.count);
		exit(1);
	}
	for (size_t i = 0; i < length; i++)
		counted.results[results[i] % RESULTS]++;
	for (size_t i = 0; option.plant && i < length; i++) {
		size_t at = (planted + i) % length;

		if (results[at] == MERGEMEM_SUCCESS || results[at] == MERGEMEM_ALREADYSH) {
			plant(batch.pages[at]);
			break;
		}
	}
}

static void batch_send(void)
{
	static const uint32_t shares[] = { 1, 1, 25, 100 };

	if (batch.count) {
		request_begin(MERGEMEM_CMD_MERGE, 0);
		put(MERGEMEM_A_PROCESSES, batch.processes,
		    batch.process_count * sizeof(*batch.processes));
		put(MERGEMEM_A_CANDIDATES, batch.candidates,
		    batch.count * sizeof(*batch.candidates));
		if (option.split && random_below(8))
			put_u32(MERGEMEM_A_SPLIT_PERCENT, shares[random_below(4)]);
		counted.requests++;
		counted.candidates += batch.count;
		tolerate(request_send(keep_results), "MERGE");
	}
	memset(batch.index, 0, sizeof(batch.index));
	batch.process_count = batch.count = batch.groups = 0;
}

/* Make room for more pages of up to so many processes. */
static void batch_reserve(uint32_t count)
{
	if (batch.count + count > MERGEMEM_MAX_CANDIDATES ||
	    batch.process_count + count > MERGEMEM_MAX_PROCESSES)
		batch_send();
}

static void batch_add(const struct page *page, uint32_t group)
{
	uint16_t *index = &batch.index[page->member];

	if (!*index) {
		batch.processes[batch.process_count] = members[page->member].process;
		*index = ++batch.process_count;
	}
	batch.pages[batch.count] = page;
	batch.candidates[batch.count++] = (struct mergemem_candidate){
		.address = page->address, .process = *index - 1, .group = group
	};
}

#endif
