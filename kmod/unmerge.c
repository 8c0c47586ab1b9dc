// SPDX-License-Identifier: GPL-2.0
/*
 * UNMERGE: give merged pages frames of their own again.
 *
 * A merged page is left the way its owner would leave it: by a write fault,
 * taken on the owner's behalf with get_user_pages_remote(). Core mm copies the
 * page, charges the copy to the owner's cgroup and maps it; here is no
 * page-table change at all. FOLL_FORCE serves mappings that are read-only at
 * the moment, as ptrace does.
 */
#include <linux/mm.h>
#include <linux/sched/signal.h>

#include "counters.h"
#include "shared.h"
#include "symbols.h"
#include "target.h"
#include "unmerge.h"

/* Available memory below this is not ours to use up. */
#define RESERVE_PAGES (SZ_16M >> PAGE_SHIFT)

/*
 * A table's worth of pages at a time: bit n is set for the merged ones among
 * the pages from @start to the end of its page table, or to @end.
 */
struct merged_pages {
	unsigned long start;
	unsigned long end;
	DECLARE_BITMAP(merged, PTRS_PER_PTE);
};

/* Caller holds the mmap_lock. */
static void find_merged(struct mm_struct *mm, struct merged_pages *pages)
{
	struct vm_area_struct *vma = find_vma(mm, pages->start);
	unsigned long address;
	spinlock_t *ptl;
	pte_t *pte;

	bitmap_zero(pages->merged, PTRS_PER_PTE);
	if (!vma || vma->vm_start >= pages->end)
		return;
	pte = mergemem_pte_lock(mm, pages->start, &ptl);
	if (!pte)
		return;
	for (address = pages->start; address < pages->end;
	     address += PAGE_SIZE) {
		unsigned long n = (address - pages->start) >> PAGE_SHIFT;
		pte_t entry = ptep_get(pte + n);
		struct page *page;

		while (vma && address >= vma->vm_end)
			vma = find_vma(mm, address);
		if (!vma)
			break;
		if (address < vma->vm_start || !vma_is_anonymous(vma) ||
		    !pte_present(entry) || pte_special(entry))
			continue;
		page = kernel_call(vm_normal_page)(vma, address, entry);
		if (page && mergemem_page_is_shared(page))
			__set_bit(n, pages->merged);
	}
	pte_unmap_unlock(pte, ptl);
}

/*
 * The next part of a range: up to the end of a page table, with unmapped space
 * skipped. Returns whether there is one. Caller holds the mmap_lock.
 */
static bool next_part(struct mm_struct *mm, unsigned long start,
		      unsigned long end, struct merged_pages *pages)
{
	struct vm_area_struct *vma = find_vma(mm, start);

	if (!vma || vma->vm_start >= end)
		return false;
	pages->start = max(start, vma->vm_start);
	pages->end = min(end, (pages->start | ~PMD_MASK) + 1);
	find_merged(mm, pages);
	return true;
}

static int count_merged(struct mm_struct *mm, unsigned long start,
			unsigned long end, unsigned long *count)
{
	struct merged_pages pages;
	bool more = true;
	int err;

	for (*count = 0; more && start < end; start = pages.end) {
		err = mergemem_mm_lock(mm);
		if (err)
			return err;
		more = next_part(mm, start, end, &pages);
		mergemem_mm_unlock(mm);
		if (more)
			*count += bitmap_weight(pages.merged, PTRS_PER_PTE);
		if (signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

/* Returns the number of pages unmerged, or a negative errno when it was none. */
static int unmerge_part(struct mm_struct *mm, const struct merged_pages *pages)
{
	int unmerged = 0;
	unsigned long n;

	for_each_set_bit(n, pages->merged, PTRS_PER_PTE) {
		long err = compat_fault_in_write(mm, pages->start +
							     n * PAGE_SIZE);

		if (err < 0)
			return unmerged ? unmerged : err;
		unmerged++;
	}
	return unmerged;
}

/**
 * mergemem_unmerge - unmerge the merged pages of a range
 * @mm: whose pages
 * @start: the range
 * @end: its end
 * @unmerged: receives how many pages were given their own frame
 * @next: receives the address to go on from; @end when all is done
 * @why: set to a sentence for a human on failure
 *
 * Memory is looked at before anything is changed: a host that saves memory by
 * merging may not have enough to undo it.
 *
 * Return: 0, also when stopped early by the limit or a signal; -ENOMEM, -EBUSY,
 * -EINTR when nothing was changed
 */
int mergemem_unmerge(struct mm_struct *mm, unsigned long start,
		     unsigned long end, unsigned long *unmerged,
		     unsigned long *next, const char **why)
{
	struct merged_pages pages;
	unsigned long merged;
	bool more = true;
	int done, err;

	*unmerged = 0;
	*next = start;
	*why = "the process keeps its mmap_lock; try again later";
	err = count_merged(mm, start, end, &merged);
	if (err)
		return err;
	if (si_mem_available() < (long)(merged + RESERVE_PAGES)) {
		*why = "not enough memory is available to unmerge this range; nothing was changed";
		return -ENOMEM;
	}

	while (*next < end && *unmerged < MERGEMEM_MAX_UNMERGE_PAGES &&
	       !signal_pending(current)) {
		err = mergemem_mm_lock(mm);
		if (err)
			break;
		more = next_part(mm, *next, end, &pages);
		done = more ? unmerge_part(mm, &pages) : 0;
		mergemem_mm_unlock(mm);
		if (done < 0) {
			err = done;
			*why = "a page could not be given a frame of its own";
			break;
		}
		*unmerged += done;
		*next = more ? pages.end : end;
		cond_resched();
	}
	mergemem_count(&mergemem_counted.unmerged_pages, *unmerged);
	return *unmerged ? 0 : err;
}
