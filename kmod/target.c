// SPDX-License-Identifier: GPL-2.0
/*
 * Processes: who may be touched, and the way to a page table.
 */
#include <linux/cred.h>
#include <linux/delay.h>
#include <linux/mmap_lock.h>
#include <linux/ptrace.h>
#include <linux/sched/coredump.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>

#include "symbols.h"
#include "target.h"

/* Kinds of mapping whose pages are never merged; README gives the reasons. */
#define REFUSED_VM_FLAGS						\
	(VM_SHARED | VM_MAYSHARE | VM_PFNMAP | VM_IO | VM_MIXEDMAP |	\
	 VM_DONTEXPAND | VM_HUGETLB | VM_LOCKED | VM_DONTDUMP |		\
	 VM_WIPEONFORK | VM_UFFD_MISSING | VM_UFFD_WP | VM_UFFD_MINOR |	\
	 VM_SHADOW_STACK | VM_DROPPABLE)

/* mmap_lock: this often, with this pause, and then the process is busy. */
#define LOCK_ATTEMPTS		20
#define LOCK_PAUSE_US		500

static struct task_struct *task_get(const struct mergemem_process *process)
{
	struct pid *pid = find_get_pid(process->pid);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_TGID);

	put_pid(pid);
	if (task && div_u64(task->start_boottime, NSEC_PER_SEC / USER_HZ) !=
			    process->start_time) {
		put_task_struct(task);	/* the pid has been recycled */
		return NULL;
	}
	return task;
}

/**
 * mergemem_target_get - look a process up and get hold of its memory
 * @target: filled in on success
 * @process: which one, and what the client permits
 * @why: set to a sentence for a human on failure
 *
 * mm_access() looks at the task under its exec_update_lock, so that what was
 * checked and what is returned belong to the same program: an exec of a
 * set-user-id program comes either before both or after both.
 *
 * Return: 0; -ESRCH: gone, recycled, or a kernel thread; -EACCES: refused;
 * -EINTR: killed meanwhile.
 */
int mergemem_target_get(struct mergemem_target *target,
			const struct mergemem_process *process,
			const char **why)
{
	struct task_struct *task = task_get(process);
	struct mm_struct *mm;

	*why = "no such process: it has ended, or the pid belongs to another one";
	if (!task)
		return -ESRCH;

	mm = kernel_call(mm_access)(task, PTRACE_MODE_ATTACH_REALCREDS);
	target->uid = task_uid(task);
	put_task_struct(task);
	if (IS_ERR_OR_NULL(mm)) {
		if (PTR_ERR(mm) == -EINTR)
			return -EINTR;
		if (!mm || PTR_ERR(mm) == -ESRCH) {
			*why = "the process has no memory: it is ending, or a kernel thread";
			return -ESRCH;
		}
		*why = "access to the process was denied, as ptrace would be";
		return -EACCES;
	}
	if (get_dumpable(mm) != SUID_DUMP_USER &&
	    !(process->flags & MERGEMEM_PROCESS_UNDUMPABLE)) {
		*why = "the process is not dumpable; a policy must name it (include_undumpable)";
		mmput(mm);
		return -EACCES;
	}
	target->mm = mm;
	return 0;
}

void mergemem_target_put(struct mergemem_target *target)
{
	if (target->mm)
		mmput(target->mm);
	target->mm = NULL;
}

/**
 * mergemem_mm_lock - take the mmap_lock of a process for reading, or give up
 * @mm: its memory
 *
 * Never queues behind a writer: a reader that waits is waited for by the next
 * writer, and a process must not stall because somebody wants to save memory.
 * At most one mmap_lock is held at a time, so there is no order to respect.
 *
 * Return: 0, or -EBUSY, or -EINTR
 */
int mergemem_mm_lock(struct mm_struct *mm)
{
	unsigned int attempt;

	for (attempt = 0; attempt < LOCK_ATTEMPTS; attempt++) {
		if (mmap_read_trylock(mm))
			return 0;
		if (signal_pending(current))
			return -EINTR;
		usleep_range(LOCK_PAUSE_US, 2 * LOCK_PAUSE_US);
	}
	return -EBUSY;
}

void mergemem_mm_unlock(struct mm_struct *mm)
{
	mmap_read_unlock(mm);
}

/**
 * mergemem_vma_mergeable - whether pages of a mapping may be merged
 * @vma: the mapping; the caller holds the mmap_lock
 *
 * Only private anonymous memory. VM_DONTDUMP and VM_WIPEONFORK are how programs
 * mark secrets: their pages are not even looked at.
 */
bool mergemem_vma_mergeable(struct vm_area_struct *vma)
{
	mmap_assert_locked(vma->vm_mm);
	return vma_is_anonymous(vma) && !(vma->vm_flags & REFUSED_VM_FLAGS);
}

/* Whether a huge page is mapped here at this moment; a hint for a result code. */
bool mergemem_huge_at(struct mm_struct *mm, unsigned long address)
{
	pmd_t *pmd = kernel_call(mm_find_pmd)(mm, address);

	return pmd && pmd_trans_huge(READ_ONCE(*pmd));
}

/**
 * mergemem_pte_lock - map and lock the page table that covers an address
 * @mm: whose; the caller holds the mmap_lock
 * @address: a user address within a mapping
 * @ptl: receives the lock; release both with pte_unmap_unlock()
 *
 * The mmap_lock keeps page tables of anonymous mappings in place: collapse and
 * munmap take it for writing. Only a huge page may be split into a page table
 * at any time, which here means: no table yet.
 *
 * Return: the entry of @address, or NULL when no page table is there
 */
pte_t *mergemem_pte_lock(struct mm_struct *mm, unsigned long address,
			 spinlock_t **ptl)
{
	pmd_t *pmd = kernel_call(mm_find_pmd)(mm, address);
	pmd_t entry;

	mmap_assert_locked(mm);
	if (!pmd)
		return NULL;
	entry = READ_ONCE(*pmd);
	if (!pmd_present(entry) || pmd_trans_huge(entry) || pmd_bad(entry))
		return NULL;
	return compat_pte_offset_map_lock(mm, pmd, address, ptl);
}
