// SPDX-License-Identifier: GPL-2.0
/*
 * What compat.h wants to know of the kernel that is built for.
 *
 * facts.sh has the compiler check this file with the kernel's own flags, once,
 * and writes MERGEMEM_HAVE_... into facts.h for every probe that has no error.
 * So each probe stands alone: what one of them gets wrong says nothing about
 * the next. Nothing here is ever run, or part of the module.
 *
 * Compiled as if built in: some functions are declared only then, and their
 * types are worth checking although a module has to look them up.
 */
#include <linux/memcontrol.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/percpu_counter.h>
#include <linux/ptrace.h>
#include <linux/rmap.h>
#include <linux/sched/coredump.h>
#include <linux/swap.h>
#include <linux/vmstat.h>
#include <net/genetlink.h>
#include <asm/tlbflush.h>

/* Some declaration or statements that must compile. */
#define FACT(name, ...)						\
	static void __maybe_unused probe_##name(void)		\
	{							\
		__VA_ARGS__;					\
	}

/* A function, not a macro, of exactly this type. */
#define FUNCTION(name, function, ...)				\
	FACT(name, static_assert(__builtin_types_compatible_p(	\
		typeof(function), __VA_ARGS__)))

/* A function that every kernel must have: facts.h is an error without it. */
#define NEEDED(function, ...) FUNCTION(needed_##function, function, __VA_ARGS__)

/* Proof that probes can succeed and can fail; see facts.sh. */
FACT(must_succeed, struct mm_struct *mm = NULL; (void)mm)
FACT(must_fail, no_such_function_in_any_kernel())

NEEDED(ptrace_may_access, bool (struct task_struct *, unsigned int))
NEEDED(vm_normal_page,
	struct page *(struct vm_area_struct *, unsigned long, pte_t))
NEEDED(flush_tlb_mm_range,
	void (struct mm_struct *, unsigned long, unsigned long, unsigned int, bool))
NEEDED(folio_free_swap, bool (struct folio *))
NEEDED(lru_add_drain_all, void (void))
NEEDED(__mmu_notifier_invalidate_range_start,
	int (struct mmu_notifier_range *))

FUNCTION(FOLIO_RMAP_PTES, folio_add_file_rmap_ptes,
	 void (struct folio *, struct page *, int, struct vm_area_struct *))
FUNCTION(PAGE_RMAP, page_add_file_rmap,
	 void (struct page *, struct vm_area_struct *, bool))

FUNCTION(PTE_OFFSET_MAP_LOCK_INNER, __pte_offset_map_lock,
	 pte_t *(struct mm_struct *, pmd_t *, unsigned long, spinlock_t **))
FUNCTION(PTE_OFFSET_MAP_LOCK, pte_offset_map_lock,
	 pte_t *(struct mm_struct *, pmd_t *, unsigned long, spinlock_t **))

FUNCTION(NOTIFIER_RANGE_INIT, mmu_notifier_range_init,
	 void (struct mmu_notifier_range *, enum mmu_notifier_event, unsigned int,
		struct mm_struct *, unsigned long, unsigned long))
FUNCTION(NOTIFIER_RANGE_INIT_VMA, mmu_notifier_range_init,
	 void (struct mmu_notifier_range *, enum mmu_notifier_event, unsigned int,
		struct vm_area_struct *, struct mm_struct *, unsigned long,
		unsigned long))
FUNCTION(NOTIFIER_RANGE_END, __mmu_notifier_invalidate_range_end,
	 void (struct mmu_notifier_range *))
FUNCTION(NOTIFIER_RANGE_END_ONLY, __mmu_notifier_invalidate_range_end,
	 void (struct mmu_notifier_range *, bool))
FACT(FLUSH_NOTIFIES_SECONDARY,
	struct mmu_notifier_ops ops; (void)&ops.arch_invalidate_secondary_tlbs)
FUNCTION(NOTIFIER_INVALIDATE_RANGE, __mmu_notifier_invalidate_range,
	 void (struct mm_struct *, unsigned long, unsigned long))

FACT(RSS_PERCPU_COUNTERS,
	struct mm_struct *mm = NULL; struct percpu_counter *rss = mm->rss_stat;
	(void)rss)
FACT(RSS_ATOMIC_COUNTERS,
	struct mm_struct *mm = NULL; atomic_long_t *rss = mm->rss_stat.count;
	(void)rss)

FUNCTION(GENL_INFO_DUMP, genl_info_dump,
	 const struct genl_info *(struct netlink_callback *))
FACT(GENL_DUMPIT_INFO_ATTRS,
	struct nlattr **attrs = genl_dumpit_info(NULL)->attrs; (void)attrs)

FUNCTION(GUP_REMOTE, get_user_pages_remote,
	 long (struct mm_struct *, unsigned long, unsigned long, unsigned int,
		struct page **, int *))
FUNCTION(GUP_REMOTE_VMAS, get_user_pages_remote,
	 long (struct mm_struct *, unsigned long, unsigned long, unsigned int,
		struct page **, struct vm_area_struct **, int *))

FUNCTION(DUMPABLE_OF_TASK, task_exec_state_get_dumpable,
	 enum task_dumpable (struct task_struct *))
FUNCTION(DUMPABLE_OF_MM, get_dumpable, int (struct mm_struct *))

FUNCTION(SPLIT_INNER, __split_huge_page_to_list_to_order,
	 int (struct page *, struct list_head *, unsigned int))
FUNCTION(SPLIT_TO_ORDER, split_huge_page_to_list_to_order,
	 int (struct page *, struct list_head *, unsigned int))
FUNCTION(SPLIT, split_huge_page_to_list,
	 int (struct page *, struct list_head *))

/*
 * folio_isolate_lru() is declared where modules cannot look. It and this one
 * went from int to bool together (6.3).
 */
FUNCTION(ISOLATE_RETURNS_INT, isolate_movable_page,
	 int (struct page *, isolate_mode_t))

FUNCTION(PTE_MKUFFD_WP, pte_mkuffd_wp, pte_t (pte_t))
FUNCTION(PTE_MKUFFD, pte_mkuffd, pte_t (pte_t))
