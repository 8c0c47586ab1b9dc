/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_UNMERGE_H
#define MERGEMEM_UNMERGE_H

#include <linux/mm_types.h>

int mergemem_unmerge(struct mm_struct *mm, unsigned long start,
		     unsigned long end, bool count_only,
		     unsigned long *unmerged, unsigned long *next,
		     const char **why);

#endif /* MERGEMEM_UNMERGE_H */
