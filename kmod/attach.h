/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_ATTACH_H
#define MERGEMEM_ATTACH_H

#include "request.h"

u8 mergemem_no_page(struct merge_request *request, const struct merge_page *page);
u8 mergemem_judge(struct page *page);
u8 mergemem_look(struct merge_request *request, const struct merge_run *run,
		 const struct merge_page *page, pte_t entry,
		 struct page **found);
bool mergemem_has_target_bytes(const struct merge_group *group,
			       struct page *page);
void mergemem_attach_run(struct merge_request *request,
			 const struct merge_run *run);

#endif /* MERGEMEM_ATTACH_H */
