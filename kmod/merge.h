/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_MERGE_H
#define MERGEMEM_MERGE_H

#include "uapi/mergemem.h"

extern bool mergemem_allow_cross_uid;

/**
 * struct mergemem_merge_call - a MERGE request, parsed
 * @processes: the processes it names
 * @process_count: how many
 * @candidates: the nominated pages; process and group numbers are in range
 * @candidate_count: how many
 * @flags: bits of enum mergemem_merge_flag
 * @split_percent: share of a large folio that must be mergeable for it to be
 *	split; 0: never
 */
struct mergemem_merge_call {
	const struct mergemem_process *processes;
	unsigned int process_count;
	const struct mergemem_candidate *candidates;
	unsigned int candidate_count;
	u32 flags;
	u32 split_percent;
};

int mergemem_merge(const struct mergemem_merge_call *call, u8 *results);

#endif /* MERGEMEM_MERGE_H */
