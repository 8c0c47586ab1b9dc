/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Differences between kernels, all of them.
 *
 * The rest of the module is written for the newest kernel; here its calls are
 * translated downwards. The facts (MERGEMEM_HAVE_...) are in facts.h, which the
 * build makes by compiling the probes of facts.c. Each entry says what changed,
 * and when a branch may go; a kernel that fits none is an error with a name.
 */
#ifndef MERGEMEM_COMPAT_H
#define MERGEMEM_COMPAT_H

#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/percpu_counter.h>
#include <linux/rmap.h>
#include <linux/sched/coredump.h>
#include <net/genetlink.h>

#include "facts.h"

/*
 * Functions that exist under these names on some kernels only; symbols.h adds
 * them to its list.
 */
#if defined(MERGEMEM_HAVE_FOLIO_RMAP_PTES)
#define MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)	\
	SYMBOL(folio_add_file_rmap_ptes)	\
	SYMBOL(folio_remove_rmap_ptes)
#elif defined(MERGEMEM_HAVE_PAGE_RMAP)
#define MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)	\
	SYMBOL(page_add_file_rmap)		\
	SYMBOL(page_remove_rmap)
#else
#define MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)
#error mergemem does not know this kernel: how to count a mapping of a page? tried: folio_add_file_rmap_ptes() (since 6.8), page_add_file_rmap(); see facts.c
#endif

#if defined(MERGEMEM_HAVE_PTE_OFFSET_MAP_LOCK_INNER)
#define MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)	SYMBOL(__pte_offset_map_lock)
#elif defined(MERGEMEM_HAVE_PTE_OFFSET_MAP_LOCK)
#define MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)	SYMBOL(pte_offset_map_lock)
#elif defined(pte_offset_map_lock)
#define MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)
#else
#define MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)
#error mergemem does not know this kernel: how to lock a page table? tried: pte_offset_map_lock() as a function (since 7.x) and a macro, __pte_offset_map_lock() (since 6.5); see facts.c
#endif

#if defined(MERGEMEM_HAVE_FLUSH_NOTIFIES_SECONDARY)
#define MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL)
#elif defined(MERGEMEM_HAVE_NOTIFIER_INVALIDATE_RANGE)
#define MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL) \
	SYMBOL(__mmu_notifier_invalidate_range)
#else
#define MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL)
#error mergemem does not know this kernel: how are secondary TLBs flushed? tried: arch_invalidate_secondary_tlbs (since 6.6), __mmu_notifier_invalidate_range(); see facts.c
#endif

#if defined(MERGEMEM_HAVE_DUMPABLE_OF_TASK)
#define MERGEMEM_COMPAT_DUMPABLE_SYMBOLS(SYMBOL) \
	SYMBOL(task_exec_state_get_dumpable)
#else
#define MERGEMEM_COMPAT_DUMPABLE_SYMBOLS(SYMBOL)
#endif

#if !defined(CONFIG_TRANSPARENT_HUGEPAGE)
#define MERGEMEM_COMPAT_SPLIT_SYMBOLS(SYMBOL)
#elif defined(MERGEMEM_HAVE_SPLIT_INNER)
#define MERGEMEM_COMPAT_SPLIT_SYMBOLS(SYMBOL) \
	SYMBOL(__split_huge_page_to_list_to_order)
#elif defined(MERGEMEM_HAVE_SPLIT_TO_ORDER)
#define MERGEMEM_COMPAT_SPLIT_SYMBOLS(SYMBOL) \
	SYMBOL(split_huge_page_to_list_to_order)
#elif defined(MERGEMEM_HAVE_SPLIT)
#define MERGEMEM_COMPAT_SPLIT_SYMBOLS(SYMBOL) SYMBOL(split_huge_page_to_list)
#else
#define MERGEMEM_COMPAT_SPLIT_SYMBOLS(SYMBOL)
#error mergemem does not know this kernel: how to split a huge page? tried: __split_huge_page_to_list_to_order() (since 7.x), split_huge_page_to_list_to_order() (since 6.9), split_huge_page_to_list(); see facts.c
#endif

#define MERGEMEM_COMPAT_SYMBOLS(SYMBOL)		\
	MERGEMEM_COMPAT_SPLIT_SYMBOLS(SYMBOL)	\
	MERGEMEM_COMPAT_RMAP_SYMBOLS(SYMBOL)	\
	MERGEMEM_COMPAT_PTE_SYMBOLS(SYMBOL)	\
	MERGEMEM_COMPAT_NOTIFIER_SYMBOLS(SYMBOL) \
	MERGEMEM_COMPAT_DUMPABLE_SYMBOLS(SYMBOL)

/* Shadow stacks (6.6), droppable pages (6.11), userfaultfd on reads (7.x). */
#ifndef VM_SHADOW_STACK
#define VM_SHADOW_STACK VM_NONE
#endif
#ifndef VM_DROPPABLE
#define VM_DROPPABLE VM_NONE
#endif
#ifndef VM_UFFD_RWP
#define VM_UFFD_RWP VM_NONE
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
#if defined(MERGEMEM_HAVE_RSS_PERCPU_COUNTERS)
	percpu_counter_add(&mm->rss_stat[member], value);
#elif defined(MERGEMEM_HAVE_RSS_ATOMIC_COUNTERS)
	atomic_long_add(value, &mm->rss_stat.count[member]);
#else
#error mergemem does not know this kernel: where are RSS counters? tried: mm->rss_stat[] per CPU (since 6.2), mm->rss_stat.count[]; see facts.c
#endif
}

/*
 * Calls to unexported functions. Macros, because kernel_call() is defined in
 * symbols.h, which needs the lists above.
 */

/*
 * 6.5: page tables may vanish under a lockless walker, so mapping and locking
 * became a function that checks again, and may return NULL. 7.x: that function
 * lost its underscores.
 */
#if defined(MERGEMEM_HAVE_PTE_OFFSET_MAP_LOCK_INNER)
#define compat_pte_offset_map_lock(mm, pmd, address, ptl) \
	kernel_call(__pte_offset_map_lock)(mm, pmd, address, ptl)
#elif defined(MERGEMEM_HAVE_PTE_OFFSET_MAP_LOCK)
#define compat_pte_offset_map_lock(mm, pmd, address, ptl) \
	kernel_call(pte_offset_map_lock)(mm, pmd, address, ptl)
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
#if defined(MERGEMEM_HAVE_NOTIFIER_RANGE_END)
#define compat_notifier_range_end(range) \
	kernel_call(__mmu_notifier_invalidate_range_end)(range)
#elif defined(MERGEMEM_HAVE_NOTIFIER_RANGE_END_ONLY)
#define compat_notifier_range_end(range) \
	kernel_call(__mmu_notifier_invalidate_range_end)(range, false)
#else
#error mergemem does not know this kernel: how to end a notifier range? tried: __mmu_notifier_invalidate_range_end() with one argument (since 6.6) and two; see facts.c
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
#if defined(MERGEMEM_HAVE_NOTIFIER_RANGE_INIT)
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR,
				MMU_NOTIFIER_RANGE_BLOCKABLE, vma->vm_mm, start,
				end);
#elif defined(MERGEMEM_HAVE_NOTIFIER_RANGE_INIT_VMA)
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR,
				MMU_NOTIFIER_RANGE_BLOCKABLE, vma, vma->vm_mm,
				start, end);
#else
#error mergemem does not know this kernel: how to begin a notifier range? tried: mmu_notifier_range_init() with six arguments (since 6.3) and seven; see facts.c
#endif
}

/*
 * Splits a large folio into single pages. The caller holds its lock and one
 * reference; both are on the folio of the first page afterwards. May sleep.
 * Returns 0, or a negative errno when the folio is in use.
 *
 * 6.9 (c010d47f107f "mm: thp: split huge page to any lower order pages"): the
 * order to split to. 7.x: an inline function around one with underscores.
 */
#if !defined(CONFIG_TRANSPARENT_HUGEPAGE)
#define compat_split_folio(folio) ((void)(folio), -EOPNOTSUPP)
#elif defined(MERGEMEM_HAVE_SPLIT_INNER)
#define compat_split_folio(folio) \
	kernel_call(__split_huge_page_to_list_to_order)(&(folio)->page, NULL, 0)
#elif defined(MERGEMEM_HAVE_SPLIT_TO_ORDER)
#define compat_split_folio(folio) \
	kernel_call(split_huge_page_to_list_to_order)(&(folio)->page, NULL, 0)
#elif defined(MERGEMEM_HAVE_SPLIT)
#define compat_split_folio(folio) \
	kernel_call(split_huge_page_to_list)(&(folio)->page, NULL)
#else
#error mergemem does not know this kernel: how to split a folio? tried: __split_huge_page_to_list_to_order() (since 7.x), split_huge_page_to_list_to_order() (since 6.9), split_huge_page_to_list(); see facts.c
#endif

/*
 * Takes a folio off its LRU list, and a reference on it; returns whether it was
 * on one. Declared in mm/internal.h.
 *
 * 6.3 (be2d57563822 "mm: change to return bool for folio_isolate_lru()"): before,
 * 0 was success.
 */
#if defined(MERGEMEM_HAVE_ISOLATE_RETURNS_INT)
int folio_isolate_lru(struct folio *folio);
#define compat_folio_isolate_lru(folio) (!kernel_call(folio_isolate_lru)(folio))
#else
bool folio_isolate_lru(struct folio *folio);
#define compat_folio_isolate_lru(folio) kernel_call(folio_isolate_lru)(folio)
#endif

/* 7.x: without _wp, since write protection is one of its uses only. */
#if defined(MERGEMEM_HAVE_PTE_MKUFFD)
#define compat_pte_mkuffd_wp(entry) pte_mkuffd(entry)
#define compat_pte_uffd_wp(entry) pte_uffd(entry)
#elif defined(MERGEMEM_HAVE_PTE_MKUFFD_WP)
#define compat_pte_mkuffd_wp(entry) pte_mkuffd_wp(entry)
#define compat_pte_uffd_wp(entry) pte_uffd_wp(entry)
#else
#error mergemem does not know this kernel: how to mark an entry for userfaultfd? tried: pte_mkuffd() (since 7.x), pte_mkuffd_wp(); see facts.c
#endif

/* 6.7: genl_info for dumps; before it, the attributes alone. */
static inline struct nlattr **compat_dump_attrs(struct netlink_callback *cb)
{
#if defined(MERGEMEM_HAVE_GENL_INFO_DUMP)
	return genl_info_dump(cb)->attrs;
#elif defined(MERGEMEM_HAVE_GENL_DUMPIT_INFO_ATTRS)
	return genl_dumpit_info(cb)->attrs;
#else
#error mergemem does not know this kernel: where are the attributes of a dump? tried: genl_info_dump() (since 6.7), genl_dumpit_info()->attrs; see facts.c
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
#if defined(MERGEMEM_HAVE_GUP_REMOTE)
	return get_user_pages_remote(mm, address, 1, FOLL_WRITE | FOLL_FORCE,
				     NULL, NULL);
#elif defined(MERGEMEM_HAVE_GUP_REMOTE_VMAS)
	return get_user_pages_remote(mm, address, 1, FOLL_WRITE | FOLL_FORCE,
				     NULL, NULL, NULL);
#else
#error mergemem does not know this kernel: how to fault a page in? tried: get_user_pages_remote() with six arguments (since 6.5) and seven; see facts.c
#endif
}

/*
 * Whether a process is dumpable by its owner. 7.x: a property of the program
 * that runs, no longer of its memory. Caller holds exec_update_lock, under
 * which both belong together.
 */
#if defined(MERGEMEM_HAVE_DUMPABLE_OF_TASK)
#define compat_dumpable_by_owner(task, mm) \
	(kernel_call(task_exec_state_get_dumpable)(task) == TASK_DUMPABLE_OWNER)
#elif defined(MERGEMEM_HAVE_DUMPABLE_OF_MM)
#define compat_dumpable_by_owner(task, mm) \
	(get_dumpable(mm) == SUID_DUMP_USER)
#else
#error mergemem does not know this kernel: is a process dumpable? tried: task_exec_state_get_dumpable() (since 7.x), get_dumpable(); see facts.c
#endif

#endif /* MERGEMEM_COMPAT_H */
