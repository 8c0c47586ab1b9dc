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
	 VM_UFFD_RWP | VM_SHADOW_STACK | VM_DROPPABLE)

#define LOCK_PAUSE_US 500

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

/*
 * May be the last reference, if the process has ended meanwhile; tearing down
 * its memory is nothing to keep a request waiting for.
 */
void mergemem_target_put(struct mergemem_target *target)
{
	if (target->mm)
		mmput_async(target->mm);
	target->mm = NULL;
}

/*
 * What mm_access() does, but without waiting for an exec in progress: it may
 * take as long as the process likes (closing a file of a slow FUSE server), and
 * whoever waits here holds generic netlink's cb_lock against the whole host.
 *
 * exec_update_lock makes one of three looks: the memory, the permission to touch
 * it and the user belong to the same program, and an exec of a set-user-id
 * program comes before all of them or after.
 */
static int look_at_task(struct mergemem_target *target,
			struct task_struct *task, u32 flags, const char **why)
{
	if (!down_read_trylock(&task->signal->exec_update_lock)) {
		*why = "the process is executing another program; try again later";
		return -EBUSY;
	}
	target->uid = task_uid(task);
	target->mm = get_task_mm(task);
	if (!target->mm)
		*why = "the process has no memory: it is ending, or a kernel thread";
	else if (!kernel_call(ptrace_may_access)(task,
						 PTRACE_MODE_ATTACH_REALCREDS))
		*why = "access to the process was denied, as ptrace would be";
	else if (!compat_dumpable_by_owner(task, target->mm) &&
		 !(flags & MERGEMEM_PROCESS_UNDUMPABLE))
		*why = "the process is not dumpable; a policy must name it (include_undumpable)";
	else
		*why = NULL;
	up_read(&task->signal->exec_update_lock);

	if (!target->mm)
		return -ESRCH;
	if (!*why)
		return 0;
	mergemem_target_put(target);
	return -EACCES;
}

/**
 * mergemem_target_get - look a process up and get hold of its memory
 * @target: filled in on success; its mm is NULL otherwise
 * @process: which one, and what the client permits
 * @why: set to a sentence for a human on failure
 *
 * Return: 0; -ESRCH: gone, recycled, or a kernel thread; -EACCES: refused;
 * -EBUSY: in the middle of an exec
 */
int mergemem_target_get(struct mergemem_target *target,
			const struct mergemem_process *process,
			const char **why)
{
	struct task_struct *task = task_get(process);
	int err;

	*target = (struct mergemem_target){};
	if (!task) {
		*why = "no such process: it has ended, or the pid belongs to another one";
		return -ESRCH;
	}
	err = look_at_task(target, task, process->flags, why);
	put_task_struct(task);
	return err;
}

/**
 * mergemem_mm_lock - take the mmap_lock of a process for reading, or give up
 * @mm: its memory
 * @patience: how many more times to try again; counted down
 *
 * Never queues behind a writer: a reader that waits is waited for by the next
 * writer, and a process must not stall because somebody wants to save memory.
 * At most one mmap_lock is held at a time, so there is no order to respect.
 *
 * Return: 0, or -EBUSY, or -ECANCELED on a signal: netlink answers a request that
 * ends with -EINTR with nothing at all
 */
int mergemem_mm_lock(struct mm_struct *mm, unsigned int *patience)
{
	while (!mmap_read_trylock(mm)) {
		if (signal_pending(current))
			return -ECANCELED;
		if (!*patience)
			return -EBUSY;
		--*patience;
		usleep_range(LOCK_PAUSE_US, 2 * LOCK_PAUSE_US);
	}
	return 0;
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
	lockdep_assert_held(&vma->vm_mm->mmap_lock);
	return vma_is_anonymous(vma) && !(vma->vm_flags & REFUSED_VM_FLAGS);
}

/**
 * mergemem_table_at - whether a page table, or a huge page, covers an address
 * @mm: whose; the caller holds the mmap_lock
 * @address: where to look
 * @end: lowered to where the answer ends: the end of the page table, or of the
 *	hole. Sparse mappings of terabytes are crossed in steps of 1 GiB.
 */
bool mergemem_table_at(struct mm_struct *mm, unsigned long address,
		       unsigned long *end)
{
	pmd_t *pmd = kernel_call(mm_find_pmd)(mm, address);
	unsigned long mask = pmd ? PMD_MASK : PUD_MASK;

	*end = min(*end, (address | ~mask) + 1);
	return pmd && pmd_present(READ_ONCE(*pmd));
}

/**
 * mergemem_huge_lock - lock the one entry that maps a huge page
 * @mm: whose; the caller holds the mmap_lock
 * @address: a user address within a mapping
 * @ptl: receives the lock; release it with spin_unlock()
 *
 * Return: the page behind @address, which the lock keeps mapped, or NULL when
 * no huge page is mapped there. Of the huge zero page it is no anonymous one.
 */
struct page *mergemem_huge_lock(struct mm_struct *mm, unsigned long address,
				spinlock_t **ptl)
{
	pmd_t *pmd = kernel_call(mm_find_pmd)(mm, address);

	lockdep_assert_held(&mm->mmap_lock);
	if (!pmd)
		return NULL;
	*ptl = pmd_lock(mm, pmd);
	if (pmd_present(*pmd) && pmd_trans_huge(*pmd))
		return pmd_page(*pmd) + pte_index(address);
	spin_unlock(*ptl);
	return NULL;
}

/**
 * mergemem_pte_lock - map and lock the page table that covers an address
 * @mm: whose; the caller holds the mmap_lock
 * @address: a user address within a mapping
 * @ptl: receives the lock; release both with pte_unmap_unlock()
 *
 * The mmap_lock keeps page tables of anonymous mappings in place: collapse takes
 * it for writing, and munmap takes mappings out under it before their tables.
 * Only a huge page may be split into a page table at any time, which here means:
 * no table yet.
 *
 * Return: the entry of @address, or NULL when no page table is there
 */
pte_t *mergemem_pte_lock(struct mm_struct *mm, unsigned long address,
			 spinlock_t **ptl)
{
	pmd_t *pmd = kernel_call(mm_find_pmd)(mm, address);
	pmd_t entry;

	lockdep_assert_held(&mm->mmap_lock);
	if (!pmd)
		return NULL;
	entry = READ_ONCE(*pmd);
	if (!pmd_present(entry) || pmd_trans_huge(entry) || pmd_bad(entry))
		return NULL;
	return compat_pte_offset_map_lock(mm, pmd, address, ptl);
}
