/* SPDX-License-Identifier: MIT */
/*
 * What the fuzzer does to good requests: an attribute twice, in another order, within another one,
 * with another length, number or content; headers that lie.
 */
#ifndef FUZZ_MISTAKES_H
#define FUZZ_MISTAKES_H

#include "fuzz_requests.h"

static struct part *any_part(struct composer *composer)
{
	return &composer->part[below(composer, composer->part_count)];
}

static void swap_parts(struct composer *composer)
{
	struct part *a = any_part(composer), *b = any_part(composer), kept = *a;

	*a = *b;
	*b = kept;
}

static void repeat_part(struct composer *composer)
{
	const struct part *part = any_part(composer);

	if (composer->part_count < MAX_PARTS)
		add_part(composer, part->kind, part->content, part->length);
}

static void drop_part(struct composer *composer)
{
	struct part *part = any_part(composer);

	*part = composer->part[--composer->part_count];
}

static void rename_part(struct composer *composer)
{
	static const uint16_t bits[] = { 0, NLA_F_NESTED, NLA_F_NET_BYTEORDER, 0x3fff };
	struct part *part = any_part(composer);

	if (below(composer, 2))
		part->kind = below(composer, MERGEMEM_A_MAX + 4);
	part->kind |= bits[below(composer, 4)];
}

/* An attribute with all of another one, header too, for content. */
static void nest_part(struct composer *composer)
{
	struct part *outer = any_part(composer), *inner = any_part(composer);
	struct nlattr header = { inner->said_length, inner->kind };

	if (inner->length + NLA_HDRLEN > UINT16_MAX - NLA_HDRLEN)
		return;
	memmove(outer->content + NLA_HDRLEN, inner->content, inner->length);
	memcpy(outer->content, &header, NLA_HDRLEN);
	outer->length = inner->length + NLA_HDRLEN;
	outer->said_length = outer->length + NLA_HDRLEN;
}

static void resize_part(struct composer *composer)
{
	struct part *part = any_part(composer);
	uint32_t length = below(composer, 3) ? below(composer, 64) : below(composer, UINT16_MAX - 8);

	if (length > part->length)
		memset(part->content + part->length, any(composer), length - part->length);
	part->length = length;
	part->said_length = NLA_HDRLEN + length;
}

static void lie_about_part(struct composer *composer)
{
	any_part(composer)->said_length = odd_number(composer);
}

static void change_word(struct composer *composer)
{
	struct part *part = any_part(composer);
	uint64_t number = below(composer, 3) ? odd_number(composer) : odd_address(composer);
	uint32_t width = below(composer, 2) ? 4 : 8;

	if (part->length >= width)
		memcpy(part->content + below(composer, part->length / width) * width, &number, width);
}

static void change_byte(struct composer *composer)
{
	struct part *part = any_part(composer);

	if (part->length)
		part->content[below(composer, part->length)] ^= 1 << below(composer, 8);
}

/* An entry of an array becomes another entry, or an address a strange one. */
static void change_entry(struct composer *composer)
{
	struct part *part = any_part(composer);
	uint32_t entries = part->length / 16;
	uint64_t address = odd_address(composer);
	uint8_t *entry;

	if (!entries)
		return change_word(composer);
	entry = part->content + below(composer, entries) * 16;
	if (part->kind == MERGEMEM_A_PROCESSES)
		memcpy(entry, &composer->strange[below(composer, STRANGE_PROCESSES)], 16);
	else if (below(composer, 2))
		memcpy(entry, &address, sizeof(address));
	else
		memmove(entry, part->content + below(composer, entries) * 16, 16);
}

static void add_noise(struct composer *composer)
{
	struct part *part;

	if (composer->part_count == MAX_PARTS)
		return;
	part = add_part(composer, below(composer, MERGEMEM_A_MAX + 4), NULL, below(composer, 64));
	for (uint32_t n = 0; n < part->length; n++)
		part->content[n] = any(composer);
}

static void change_header(struct composer *composer)
{
	switch (below(composer, 6)) {
	case 0:
		composer->flags = NLM_F_REQUEST | any(composer);
		break;
	case 1:
		composer->flags ^= 1 << below(composer, 12);
		break;
	case 2:
		composer->command = below(composer, 2) ? below(composer, 8) : any(composer);
		break;
	case 3:
		composer->version = any(composer);
		break;
	case 4:
		composer->lie_bytes = below(composer, 2) ? 1 - (int)below(composer, 40) : 4096;
		break;
	default:
		composer->cut_bytes = below(composer, 2) ? below(composer, 40) : any(composer);
	}
}

static void mutate_request(struct composer *composer)
{
	static void (*const mistakes[])(struct composer *composer) = {
		swap_parts, repeat_part, drop_part, rename_part, nest_part, resize_part,
		lie_about_part, change_word, change_word, change_byte, change_entry, change_entry,
		change_entry, add_noise, change_header,
	};
	const unsigned int count = sizeof(mistakes) / sizeof(mistakes[0]);
	/* A quarter is left as it is; most have one mistake, some many. */
	unsigned int mistake_count = below(composer, 4);

	if (mistake_count == 3)
		mistake_count = 1 + below(composer, 6);
	while (mistake_count--) {
		if (composer->part_count)
			mistakes[below(composer, count)](composer);
		else
			below(composer, 2) ? add_noise(composer) : change_header(composer);
	}
}

#endif
