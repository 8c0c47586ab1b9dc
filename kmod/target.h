/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_TARGET_H
#define MERGEMEM_TARGET_H

#include <linux/mm_types.h>
#include <linux/uidgid.h>

#include "uapi/mergemem.h"

/**
 * struct mergemem_target - a process that may be looked at
 * @mm: its memory; a reference on mm_users keeps the page tables from being
 *	torn down by its exit
 * @uid: its real user when it was looked up; the floor of domains
 * @busy: its mmap_lock could not be had in this request
 */
struct mergemem_target {
	struct mm_struct *mm;
	kuid_t uid;
	bool busy;
};

int mergemem_target_get(struct mergemem_target *target,
			const struct mergemem_process *process,
			const char **why);
void mergemem_target_put(struct mergemem_target *target);

/*
 * How often a request may try again to get an mmap_lock, in all: some 10 ms of
 * waiting, whatever the number of processes that are busy.
 */
#define MERGEMEM_PATIENCE 20

int mergemem_mm_lock(struct mm_struct *mm, unsigned int *patience);
void mergemem_mm_unlock(struct mm_struct *mm);

bool mergemem_vma_mergeable(struct vm_area_struct *vma);
bool mergemem_table_at(struct mm_struct *mm, unsigned long address,
		       unsigned long *end);
struct page *mergemem_huge_lock(struct mm_struct *mm, unsigned long address,
				spinlock_t **ptl);
pte_t *mergemem_pte_lock(struct mm_struct *mm, unsigned long address,
			 spinlock_t **ptl);

#endif /* MERGEMEM_TARGET_H */
