/* SPDX-License-Identifier: MIT */
/*
 * Requests for the fuzzer, composed as a sane client would: kept as a list of attributes, so that
 * they can be broken (fuzz_mistakes.h) before they become a message.
 */
#ifndef FUZZ_REQUESTS_H
#define FUZZ_REQUESTS_H

#include "netlink.h"
#include "victims.h"

#define MAX_PARTS 12
#define PART_BYTES (80 << 10)
#define OWN_PAGES 64
#define STRANGE_PROCESSES 4
/* Most requests are about few pages; some are as large as they may be. */
#define FEW_CANDIDATES 24
#define FEW_FULL_PAGES 4096

struct part {
	uint16_t kind;
	/* What its header says. */
	uint16_t said_length;
	uint32_t length;
	uint8_t *content;
};

struct composer {
	uint64_t random, own_address;
	uint8_t command, version;
	uint16_t type, flags;
	/* Added to the length in the header of the message, and taken off its end. */
	int32_t lie_bytes;
	uint32_t cut_bytes;
	unsigned int part_count;
	struct part part[MAX_PARTS];
	/* Ours, a dead one's, init, a kernel thread. */
	struct mergemem_process strange[STRANGE_PROCESSES];
	struct message message;
	uint8_t content[MAX_PARTS][PART_BYTES] __attribute__((aligned(8)));
};

static uint64_t any(struct composer *composer)
{
	composer->random ^= composer->random << 13;
	composer->random ^= composer->random >> 7;
	composer->random ^= composer->random << 17;
	return composer->random * 0x2545f4914f6cdd1d;
}

static uint64_t below(struct composer *composer, uint64_t limit)
{
	return (any(composer) >> 16) % limit;
}

/* Eight pages are equal to eight others. */
static uint64_t own_word(size_t n)
{
	return (n / 512 % 8 + 1) * 0x9e3779b97f4a7c15 + n % 512;
}

/* A number that is likely to be a limit of something. */
static uint64_t odd_number(struct composer *composer)
{
	static const uint64_t odd[] = {
		0, 1, 2, 25, 63, 64, 65, 99, 100, 101, 255, 256, 4000, 4001, 4095, 4096, 4097,
		16384, 16385, 65535, 65536, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff,
		0x100000000, 1UL << 47, 1UL << 52, (1UL << 63) - 1, 1UL << 63, -2UL, -1UL,
	};

	switch (below(composer, 4)) {
	case 0:
		return any(composer);
	case 1:
		return any(composer) >> below(composer, 64);
	default:
		return odd[below(composer, sizeof(odd) / sizeof(odd[0]))];
	}
}

static uint64_t odd_address(struct composer *composer)
{
	static const uint64_t odd[] = {
		0, 4096, 1, 0x7ffffffff000, 0x7fffffffe000, 0x800000000000, 0x7ffffffff001,
		0xffff800000000000, 0xffff888000000000, 0xffffffff81000000, 0xffffffffff600000,
		0xfffffffffffff000, 1UL << 56, (1UL << 56) - 4096, 0x7fff00000000,
	};
	uint64_t which = below(composer, 20);

	if (which < sizeof(odd) / sizeof(odd[0]))
		return odd[which];
	return which & 1 ? any(composer) & -PAGE_BYTES : any(composer);
}

static struct part *add_part(struct composer *composer, uint16_t kind, const void *content,
			     uint32_t length)
{
	struct part *part = &composer->part[composer->part_count];

	part->kind = kind;
	part->length = length;
	part->said_length = NLA_HDRLEN + length;
	part->content = composer->content[composer->part_count++];
	if (content && length)
		/* After parts were dropped, another part may have the same place. */
		memmove(part->content, content, length);
	return part;
}

/* A range of somebody, and who it is. */
static struct mergemem_process choose_range(struct composer *composer,
					    const struct victims *victims, uint64_t *address,
					    uint64_t *pages)
{
	const struct range *range;

	if (!victims->range_count || !below(composer, 8)) {
		*address = composer->own_address;
		*pages = OWN_PAGES;
		return composer->strange[below(composer, 4) ? 0 : below(composer, STRANGE_PROCESSES)];
	}
	range = &victims->range[below(composer, victims->range_count)];
	*address = range->address + below(composer, range->pages) * PAGE_BYTES;
	*pages = 1 + below(composer, below(composer, 16) ? 16 : range->pages);
	return victims->process[range->victim];
}

static void compose_depths(struct composer *composer, uint64_t pages)
{
	uint32_t depth_bytes = below(composer, 65) * 64;
	uint32_t bytes = (pages + 7) / 8;
	uint8_t *full;

	add_part(composer, MERGEMEM_A_DEPTH, &depth_bytes, sizeof(depth_bytes));
	if (pages > FEW_FULL_PAGES || below(composer, 2))
		return;
	full = add_part(composer, MERGEMEM_A_FULL_PAGES, NULL, bytes)->content;
	for (uint32_t i = 0; i < bytes; i++)
		full[i] = below(composer, 3) ? 0 : below(composer, 256);
}

static void compose_range(struct composer *composer, const struct victims *victims)
{
	uint64_t address, pages;
	struct mergemem_process process = choose_range(composer, victims, &address, &pages);

	add_part(composer, MERGEMEM_A_PROCESSES, &process, sizeof(process));
	add_part(composer, MERGEMEM_A_ADDRESS, &address, sizeof(address));
	if (!below(composer, 50))
		pages = 1UL << below(composer, 36);
	add_part(composer, MERGEMEM_A_PAGES, &pages, sizeof(pages));
	if (composer->command == MERGEMEM_CMD_CHECKSUM)
		compose_depths(composer, pages);
	else if (!below(composer, 3))
		add_part(composer, MERGEMEM_A_COUNT_ONLY, NULL, 0);
}

/* Pages of the same number within their ranges are put into one group: many are equal. */
static void compose_merge(struct composer *composer, const struct victims *victims)
{
	uint32_t count = 1 + below(composer, FEW_CANDIDATES), processes = 1 + below(composer, 4);
	uint32_t percent = 1 + below(composer, 100), flags = MERGEMEM_MERGE_ANY_NODE;
	struct mergemem_candidate *candidate;
	struct mergemem_process *process;

	if (!below(composer, 200))
		count = MERGEMEM_MAX_CANDIDATES - below(composer, 2);
	if (!below(composer, 200))
		processes = MERGEMEM_MAX_PROCESSES;
	process = (void *)add_part(composer, MERGEMEM_A_PROCESSES, NULL,
				   processes * sizeof(*process))->content;
	candidate = (void *)add_part(composer, MERGEMEM_A_CANDIDATES, NULL,
				     count * sizeof(*candidate))->content;
	for (uint32_t i = 0; i < processes; i++) {
		uint64_t address, pages;

		process[i] = choose_range(composer, victims, &address, &pages);
		for (uint32_t n = i; n < count; n += processes)
			candidate[n] = (struct mergemem_candidate){
				address + n / processes % pages * PAGE_BYTES, i, n / processes,
			};
	}
	if (!below(composer, 4))
		for (uint32_t n = 0; n < count; n += 3)
			candidate[n].group = MERGEMEM_GROUP_ZERO;
	if (below(composer, 2))
		add_part(composer, MERGEMEM_A_SPLIT_PERCENT, &percent, sizeof(percent));
	if (below(composer, 2))
		add_part(composer, MERGEMEM_A_FLAGS, &flags, sizeof(flags));
}

static void compose_request(struct composer *composer, const struct victims *victims,
			    uint16_t family)
{
	uint64_t which = below(composer, 16);

	composer->part_count = 0;
	composer->lie_bytes = composer->cut_bytes = 0;
	composer->type = family;
	composer->version = 1;
	composer->flags = NLM_F_REQUEST | NLM_F_ACK;
	composer->command = which < 1 ? MERGEMEM_CMD_INFO : which < 5 ? MERGEMEM_CMD_CHECKSUM :
			    which < 12 ? MERGEMEM_CMD_MERGE : MERGEMEM_CMD_UNMERGE;
	if (composer->command == MERGEMEM_CMD_CHECKSUM)
		composer->flags |= NLM_F_DUMP;
	if (composer->command == MERGEMEM_CMD_MERGE)
		compose_merge(composer, victims);
	else if (composer->command != MERGEMEM_CMD_INFO)
		compose_range(composer, victims);
}

static void finish_request(struct composer *composer, uint32_t sequence)
{
	struct message *message = &composer->message;
	struct nlmsghdr *header = message_begin(message, composer->type, 0, composer->command);
	struct genlmsghdr *generic = NLMSG_DATA(header);

	generic->version = composer->version;
	for (unsigned int n = 0; n < composer->part_count; n++) {
		const struct part *part = &composer->part[n];
		uint8_t *to = message_reserve(message, part->kind, part->length);

		if (!to)
			break;
		memcpy(to, part->content, part->length);
		((struct nlattr *)to)[-1].nla_len = part->said_length;
	}
	/* At least the two headers: what is shorter never gets to the family. */
	if (composer->cut_bytes > message->length - NLMSG_LENGTH(GENL_HDRLEN))
		composer->cut_bytes %= message->length - NLMSG_LENGTH(GENL_HDRLEN) + 1;
	message->length -= composer->cut_bytes;
	header->nlmsg_len = message->length + composer->lie_bytes;
	header->nlmsg_flags = composer->flags;
	header->nlmsg_seq = sequence;
}

#endif
