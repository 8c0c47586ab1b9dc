/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions of the kernel's memory management that modules are not given.
 *
 * mergemem does in a module what mm/ksm.c does inside the kernel, so it needs
 * a handful of functions that mm/ksm.c can simply call. They are looked up once
 * at load; when one is missing the module refuses to load and says which.
 *
 * They are called through static calls: kernel_call(vm_normal_page)(...) is a
 * direct call instruction, patched at load. A function pointer would be an
 * indirect call, and those trap on kernels where the target is sealed (IBT) or
 * carries a type hash that the module cannot know (kCFI, FineIBT).
 */
#ifndef MERGEMEM_SYMBOLS_H
#define MERGEMEM_SYMBOLS_H

#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/ptrace.h>
#include <linux/rmap.h>
#include <linux/sched/mm.h>
#include <linux/static_call.h>
#include <linux/swap.h>

#include "compat.h"

/* Declared in mm/internal.h, and in asm/tlbflush.h but not for modules. */
pmd_t *mm_find_pmd(struct mm_struct *mm, unsigned long address);
void flush_tlb_mm_range(struct mm_struct *mm, unsigned long start,
			unsigned long end, unsigned int stride_shift,
			bool freed_tables);

/*
 * The one list; what is declared, defined and looked up all comes from it, so
 * that none can be called without having been resolved.
 */
#define MERGEMEM_SYMBOLS(SYMBOL)				\
	SYMBOL(ptrace_may_access)				\
	SYMBOL(mm_find_pmd)					\
	SYMBOL(vm_normal_page)					\
	SYMBOL(flush_tlb_mm_range)				\
	SYMBOL(folio_free_swap)					\
	SYMBOL(folio_isolate_lru)				\
	SYMBOL(lru_add_drain_all)				\
	SYMBOL(__mmu_notifier_invalidate_range_start)		\
	SYMBOL(__mmu_notifier_invalidate_range_end)		\
	MERGEMEM_COMPAT_SYMBOLS(SYMBOL)

#define MERGEMEM_DECLARE_SYMBOL(name) \
	DECLARE_STATIC_CALL(mergemem_##name, name);
MERGEMEM_SYMBOLS(MERGEMEM_DECLARE_SYMBOL)

#define kernel_call(name) static_call(mergemem_##name)

/* Returns 0, or -ENOENT after one line in the log that names what is missing. */
int mergemem_symbols_resolve(void);

#endif /* MERGEMEM_SYMBOLS_H */
