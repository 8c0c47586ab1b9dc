/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_HUGE_H
#define MERGEMEM_HUGE_H

#include "attach.h"

void mergemem_match_run(struct merge_request *request,
			const struct merge_run *run);
void mergemem_weigh_run(struct merge_request *request,
			const struct merge_run *run);
void mergemem_split_run(struct merge_request *request,
			const struct merge_run *run);

#endif /* MERGEMEM_HUGE_H */
