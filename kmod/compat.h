/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Differences between kernels, all of them.
 *
 * The rest of the module is written for the newest kernel; here its calls are
 * translated downwards. Kbuild finds the facts (MERGEMEM_HAVE_...) by looking
 * into the headers. Each entry says what changed, and when a branch may go.
 */
#ifndef MERGEMEM_COMPAT_H
#define MERGEMEM_COMPAT_H

#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/percpu_counter.h>
#include <linux/rmap.h>
#include <net/genetlink.h>

/*
 * Functions that exist under these names on some kernels only; symbols.h adds
 * them to its list.
 */
#ifdef MERGEMEM_HAVE_FOLIO_RMAP_PTES
#define MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)	\
	SYMBOL(folio_add_file_rmap_ptes)	\
	SYMBOL(folio_remove_rmap_ptes)
#else
#define MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)	\
	SYMBOL(page_add_file_rmap)		\
	SYMBOL(page_remove_rmap)
#endif

#ifdef MERGEMEM_HAVE_PTE_OFFSET_MAP_LOCK_FUNCTION
#define MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)	SYMBOL(__pte_offset_map_lock)
#else
#define MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)
#endif

#ifdef MERGEMEM_HAVE_FLUSH_NOTIFIES_SECONDARY
#define MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL)
#else
#define MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL) \
	SYMBOL(__mmu_notifier_invalidate_range)
#endif

#define MERGEMEM_COMPAT_SYMBOLS(SYMBOL)		\
	MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)	\
	MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)	\
	MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL)

/* Shadow stacks (6.6), droppable pages (6.11). */
#ifndef VM_SHADOW_STACK
#define VM_SHADOW_STACK VM_NONE
#endif
#ifndef VM_DROPPABLE
#define VM_DROPPABLE VM_NONE
#endif

/*
 * RSS counters are changed directly: add_mm_counter() calls
 * mm_trace_rss_stat(), which modules are not given. The tracepoint kmem:rss_stat
 * therefore does not see these changes.
 * Per-CPU since f1a7941243c1 "mm: convert mm's rss stats into percpu_counter"
 * (6.2).
 */
static inline void compat_add_mm_counter(struct mm_struct *mm, int member,
					 long value)
{
#ifdef MERGEMEM_HAVE_RSS_PERCPU_COUNTERS
	percpu_counter_add(&mm->rss_stat[member], value);
#else
	atomic_long_add(value, &mm->rss_stat.count[member]);
#endif
}

/*
 * Calls to unexported functions. Macros, because kernel_call() is defined in
 * symbols.h, which needs the lists above.
 */

/*
 * 6.5: page tables may vanish under a lockless walker, so mapping and locking
 * became a function that checks again, and may return NULL.
 */
#ifdef MERGEMEM_HAVE_PTE_OFFSET_MAP_LOCK_FUNCTION
#define compat_pte_offset_map_lock(mm, pmd, address, ptl) \
	kernel_call(__pte_offset_map_lock)(mm, pmd, address, ptl)
#else
#define compat_pte_offset_map_lock(mm, pmd, address, ptl) \
	pte_offset_map_lock(mm, pmd, address, ptl)
#endif

/* 6.8: the folio rmap functions replaced the page ones. */
#ifdef MERGEMEM_HAVE_FOLIO_RMAP_PTES
#define compat_add_file_rmap(page, vma) \
	kernel_call(folio_add_file_rmap_ptes)(page_folio(page), page, 1, vma)
#define compat_remove_rmap(page, vma) \
	kernel_call(folio_remove_rmap_ptes)(page_folio(page), page, 1, vma)
#else
#define compat_add_file_rmap(page, vma) \
	kernel_call(page_add_file_rmap)(page, vma, false)
#define compat_remove_rmap(page, vma) \
	kernel_call(page_remove_rmap)(page, vma, false)
#endif

/*
 * 6.6 (1af5a8109904 "mmu_notifiers: rename invalidate_range notifier" and its
 * series): flush_tlb_mm_range() tells secondary TLBs itself. Before, whoever
 * clears PTEs calls invalidate_range after the flush, under the PTL.
 */
#ifdef MERGEMEM_HAVE_FLUSH_NOTIFIES_SECONDARY
#define compat_flush_secondary(range) do { } while (0)
#else
#define compat_flush_secondary(range)					\
	do {								\
		if (mm_has_notifiers((range)->mm))			\
			kernel_call(__mmu_notifier_invalidate_range)(	\
				(range)->mm, (range)->start, (range)->end); \
	} while (0)
#endif

/* 6.6: with that, the end of a range lost its only_end argument. */
#ifdef MERGEMEM_HAVE_NOTIFIER_RANGE_ONLY_END
#define compat_notifier_range_end(range) \
	kernel_call(__mmu_notifier_invalidate_range_end)(range, false)
#else
#define compat_notifier_range_end(range) \
	kernel_call(__mmu_notifier_invalidate_range_end)(range)
#endif

/*
 * How many page-table entries map one page. For a page of a large folio: those
 * that map it alone, and those that map the whole.
 */
static inline int compat_map_count(struct page *page)
{
#ifdef MERGEMEM_HAVE_FOLIO_RMAP_PTES
	struct folio *folio = page_folio(page);
	int count = atomic_read(&page->_mapcount) + 1;

	return folio_test_large(folio) ? count + folio_entire_mapcount(folio) :
					 count;
#else
	return page_mapcount(page);
#endif
}

/* The folio rmap functions replaced the page ones in 6.8. */
static inline int compat_try_share_anon_rmap(struct folio *folio,
					     struct page *page)
{
#ifdef MERGEMEM_HAVE_FOLIO_RMAP_PTES
	return folio_try_share_anon_rmap_pte(folio, page);
#else
	return page_try_share_anon_rmap(page);
#endif
}

/*
 * BLOCKABLE: subscribers may sleep, and so must carry the invalidation out;
 * mmu_notifier_invalidate_range_start(), which is inline and calls what modules
 * are not given, would set it. Without it they may refuse, having done nothing.
 *
 * 6.3: the vma left struct mmu_notifier_range.
 */
static inline void compat_notifier_range_init(struct mmu_notifier_range *range,
					      struct vm_area_struct *vma,
					      unsigned long start,
					      unsigned long end)
{
#ifdef MERGEMEM_HAVE_NOTIFIER_RANGE_VMA
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR,
				MMU_NOTIFIER_RANGE_BLOCKABLE, vma, vma->vm_mm,
				start, end);
#else
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR,
				MMU_NOTIFIER_RANGE_BLOCKABLE, vma->vm_mm, start,
				end);
#endif
}

/* 6.7: genl_info for dumps; before it, the attributes alone. */
static inline struct nlattr **compat_dump_attrs(struct netlink_callback *cb)
{
#ifdef MERGEMEM_HAVE_GENL_INFO_DUMP
	return genl_info_dump(cb)->attrs;
#else
	return genl_dumpit_info(cb)->attrs;
#endif
}

/*
 * Breaks copy-on-write at an address, as a write of the process itself would.
 * Caller holds the mmap_lock, which is kept. Returns 1, or a negative errno.
 *
 * 6.5 (ca5e863233e8 "mm/gup: remove vmas parameter from
 * get_user_pages_remote()")
 */
static inline long compat_fault_in_write(struct mm_struct *mm,
					 unsigned long address)
{
#ifdef MERGEMEM_HAVE_GUP_REMOTE_VMAS
	return get_user_pages_remote(mm, address, 1, FOLL_WRITE | FOLL_FORCE,
				     NULL, NULL, NULL);
#else
	return get_user_pages_remote(mm, address, 1, FOLL_WRITE | FOLL_FORCE,
				     NULL, NULL);
#endif
}

#endif /* MERGEMEM_COMPAT_H */
