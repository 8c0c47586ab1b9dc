// SPDX-License-Identifier: GPL-2.0
/*
 * UNMERGE: give merged pages frames of their own again.
 *
 * A merged page is left the way its owner would leave it: by a write fault,
 * taken on the owner's behalf with get_user_pages_remote(). Core mm copies the
 * page, charges the copy to the owner's cgroup and maps it; here is no
 * page-table change at all. FOLL_FORCE serves mappings that are read-only at
 * the moment, as ptrace does.
 *
 * A fault that finds no memory, or a cgroup at its limit, ends in somebody being
 * killed. So there is a look at both before anything is changed, and again
 * before each part, with a reserve for what others take meanwhile.
 */
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/userfaultfd_k.h>

#include "counters.h"
#include "shared.h"
#include "symbols.h"
#include "target.h"
#include "unmerge.h"

/* Memory below this, of the host and of a cgroup, is not ours to use up. */
#define HOST_RESERVE_PAGES	(SZ_16M >> PAGE_SHIFT)
#define CGROUP_RESERVE_PAGES	(SZ_1M >> PAGE_SHIFT)

/* Pages of one hold of the mmap_lock: a fault that copies takes some 2 µs. */
#define PART_PAGES		128

/*
 * Some pages of one page table: bit n is set if the page n from @start on, below
 * @end, is a merged one.
 */
struct merged_pages {
	unsigned long start;
	unsigned long end;
	DECLARE_BITMAP(merged, PART_PAGES);
};

/*
 * A write to a page that somebody protects through userfaultfd is his to decide
 * on. A fault taken from here cannot wait for him, and would fail: such pages
 * stay merged.
 */
static bool is_protected(struct vm_area_struct *vma, pte_t entry)
{
	return vma->vm_flags & (VM_UFFD_WP | VM_UFFD_RWP) &&
	       compat_pte_uffd_wp(entry);
}

/* Caller holds the mmap_lock. */
static void find_merged(struct mm_struct *mm, struct merged_pages *pages)
{
	struct vm_area_struct *vma = find_vma(mm, pages->start);
	unsigned long address;
	spinlock_t *ptl;
	pte_t *pte;

	bitmap_zero(pages->merged, PART_PAGES);
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
		    !pte_present(entry) || pte_special(entry) ||
		    is_protected(vma, entry))
			continue;
		page = kernel_call(vm_normal_page)(vma, address, entry);
		if (page && mergemem_page_is_shared(page))
			__set_bit(n, pages->merged);
	}
	pte_unmap_unlock(pte, ptl);
}

/*
 * The next part of a range: up to PART_PAGES of a page table, or a hole. Returns
 * whether there is one. Caller holds the mmap_lock.
 */
static bool next_part(struct mm_struct *mm, unsigned long start,
		      unsigned long end, struct merged_pages *pages)
{
	struct vm_area_struct *vma = find_vma(mm, start);

	if (!vma || vma->vm_start >= end)
		return false;
	pages->start = max(start, vma->vm_start);
	pages->end = end;
	if (mergemem_table_at(mm, pages->start, &pages->end)) {
		pages->end = min(pages->end,
				 pages->start + PART_PAGES * PAGE_SIZE);
		find_merged(mm, pages);
	} else {
		bitmap_zero(pages->merged, PART_PAGES);
	}
	return true;
}

static int count_merged(struct mm_struct *mm, unsigned long start,
			unsigned long end, unsigned int *patience,
			unsigned long *count)
{
	struct merged_pages pages;
	bool more = true;
	int err;

	for (*count = 0; more && start < end; start = pages.end) {
		err = mergemem_mm_lock(mm, patience);
		if (err)
			return err;
		more = next_part(mm, start, end, &pages);
		mergemem_mm_unlock(mm);
		if (more)
			*count += bitmap_weight(pages.merged, PART_PAGES);
		if (signal_pending(current))
			return -ECANCELED;
		cond_resched();
	}
	return 0;
}

/*
 * How many pages the cgroups of a process will let it have more, without taking
 * any from its page cache. Version 1 limits memory and swap together, too.
 */
static unsigned long cgroup_room_pages(struct mm_struct *mm)
{
	unsigned long room = ULONG_MAX;
#ifdef CONFIG_MEMCG
	struct mem_cgroup *memcg = get_mem_cgroup_from_mm(mm);
	struct mem_cgroup *level;

	for (level = memcg; level; level = parent_mem_cgroup(level)) {
		unsigned long max = READ_ONCE(level->memory.max);
		unsigned long usage = page_counter_read(&level->memory);

		room = min(room, max > usage ? max - usage : 0);
		if (cgroup_subsys_on_dfl(memory_cgrp_subsys))
			continue;
		max = READ_ONCE(level->memsw.max);
		usage = page_counter_read(&level->memsw);
		room = min(room, max > usage ? max - usage : 0);
	}
	mem_cgroup_put(memcg);
#endif
	return room;
}

static int check_memory(struct mm_struct *mm, unsigned long wanted_pages,
			const char **why)
{
	if (!wanted_pages)
		return 0;
	if (si_mem_available() < (long)(wanted_pages + HOST_RESERVE_PAGES)) {
		*why = "not enough memory is available to unmerge this range; nothing was changed";
		return -ENOMEM;
	}
	if (cgroup_room_pages(mm) < wanted_pages + CGROUP_RESERVE_PAGES) {
		*why = "the memory limit of the process's cgroup leaves no room to unmerge this range; nothing was changed";
		return -ENOMEM;
	}
	return 0;
}

/*
 * Unmerges pages of one part, at most until the request's limit is reached, and
 * moves *next behind the last one. A page that cannot be written to on behalf of
 * its owner (poisoned memory) is left merged.
 */
static int unmerge_part(struct mm_struct *mm, const struct merged_pages *pages,
			unsigned long *unmerged, unsigned long *next,
			const char **why)
{
	unsigned long n;
	long err = check_memory(mm, bitmap_weight(pages->merged, PART_PAGES),
				why);

	if (err)
		return err;
	for_each_set_bit(n, pages->merged, PART_PAGES) {

		*next = pages->start + n * PAGE_SIZE;
		if (*unmerged >= MERGEMEM_MAX_UNMERGE_PAGES)
			return 0;
		err = compat_fault_in_write(mm, *next);
		if (err == 1) {
			++*unmerged;
		} else if (err != -EFAULT && err != -EHWPOISON) {
			*why = "there was no memory for a page of its own";
			return err;
		}
	}
	*next = pages->end;
	return 0;
}

static const char *why_not_locked(int err)
{
	return err == -ECANCELED ?
		       "a signal came; nothing was changed" :
		       "the process keeps its mmap_lock; try again later";
}

/**
 * mergemem_unmerge - unmerge the merged pages of a range
 * @mm: whose pages
 * @start: the range
 * @end: its end
 * @count_only: only count the pages
 * @unmerged: receives how many pages were given their own frame
 * @next: receives the address to go on from; @end when all is done
 * @why: set to a sentence for a human on failure
 *
 * Memory is looked at before anything is changed: a host that saves memory by
 * merging may not have enough to undo it.
 *
 * Return: 0, also when stopped early by the limit, by a signal or by want of
 * memory after some pages were done; -ENOMEM, -EBUSY, -ECANCELED when nothing was
 * changed
 */
int mergemem_unmerge(struct mm_struct *mm, unsigned long start,
		     unsigned long end, bool count_only,
		     unsigned long *unmerged, unsigned long *next,
		     const char **why)
{
	unsigned int patience = MERGEMEM_PATIENCE;
	struct merged_pages pages;
	unsigned long merged;
	int err;

	*unmerged = 0;
	*next = start;
	err = count_merged(mm, start, end, &patience, &merged);
	if (err) {
		*why = why_not_locked(err);
		return err;
	}
	if (count_only) {
		*unmerged = merged;
		*next = end;
		return 0;
	}
	err = check_memory(mm, merged, why);
	if (err)
		return err;

	while (!err && *next < end && *unmerged < MERGEMEM_MAX_UNMERGE_PAGES) {
		err = signal_pending(current) ? -ECANCELED :
						mergemem_mm_lock(mm, &patience);
		if (err) {
			*why = why_not_locked(err);
			break;
		}
		if (next_part(mm, *next, end, &pages))
			err = unmerge_part(mm, &pages, unmerged, next, why);
		else
			*next = end;
		mergemem_mm_unlock(mm);
		cond_resched();
	}
	mergemem_count(&mergemem_counted.unmerged_pages, *unmerged);
	return *unmerged ? 0 : err;
}
