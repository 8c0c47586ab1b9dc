// SPDX-License-Identifier: GPL-2.0
/*
 * Attaching: put a shared page in the place of equal anonymous pages.
 *
 * All page-table changes of the module are in this file. It works on up to
 * BATCH_PAGES pages of one page table under one page-table lock (PTL), with the
 * mmap_lock held for reading:
 *
 *   0. tell secondary MMUs          before the PTL, since they may sleep
 *   1. clear the entries            nobody can start to use a page through them
 *   2. flush the TLB, once          nobody goes on using a page through them
 *   3. for each page: check its references, compare its bytes with the target
 *   4. install the target, read-only; or put the old entry back as it was
 *
 * From 2 to 4 the pages cannot change: no CPU has a translation, page faults
 * and every other change of these entries wait for the PTL, and a page that is
 * referenced by anything but page tables (I/O) is left alone in 3. So the bytes
 * that are compared are the bytes that are replaced. mm/ksm.c write-protects
 * instead of clearing, lets go of the lock to compare, and needs the page lock
 * and a second flush to make up for it; one flush per batch is what makes this
 * cheap, and an entry that is put back as it was is what makes failure free.
 *
 * Who might meet a cleared entry, and why it does no harm:
 *
 *   page fault      reads the entry without lock, finds none, prepares a fresh
 *                   page, takes the PTL and looks again (do_anonymous_page());
 *                   by then the entry is back, and it starts over, having
 *                   allocated a page for nothing.
 *   GUP-fast        reads entries without lock. Before the clearing: it takes
 *                   its reference and then reads the entry again; either it
 *                   sees the change and drops the reference, or step 3 sees the
 *                   reference. Both sides have full barriers between. After:
 *                   it finds nothing and falls back to a page fault.
 *   rmap walks      (reclaim, migration) may pass by without the PTL when they
 *                   see none. They then find the page still mapped, give up, and
 *                   come again; reclaim has put it into the swap cache by then
 *                   (mergemem_shared_take_charge()). Memory failure waits for
 *                   the PTL.
 *   fork, mremap,   need the mmap_lock for writing; munmap takes the mapping out
 *   khugepaged,     under it before it comes here.
 *   munmap
 *   mprotect, zap,  take the PTL before they look at an entry. So do ksmd,
 *   MADV_DONTNEED   MADV_FREE, UFFDIO_MOVE, NUMA hinting, pagemap, mincore.
 *   exit            does not come: the target holds a reference on mm_users.
 *   nofault reads   (bpf_probe_read_user(), perf's stack walks) fail, as they do
 *                   on any page that is not there at the moment.
 *   secondary MMUs  were told before (step 0), or are flushed with the TLB.
 *
 * Other mergemem requests and ksmd want the PTL too. What they did before it is
 * void: the entry is read anew under the PTL, the frame it names is judged
 * anew, and the bytes are compared under the same PTL hold.
 */
#include <linux/highmem.h>
#include <linux/mmu_notifier.h>

#include "attach.h"
#include "counters.h"
#include "merge.h"
#include "shared.h"
#include "symbols.h"
#include "target.h"

/* The 1998 codes tell whose page it was: the group's first, or another one. */
u8 mergemem_no_page(struct merge_request *request, const struct merge_page *page)
{
	return page->index == group_of(request, page)->first ? MERGEMEM_NOPAGE1 :
							       MERGEMEM_NOPAGE2;
}

/*
 * Whether pages of this kind are merged: UNDECIDED, or the reason why not. The
 * caller holds the lock of an entry that maps the page.
 */
u8 mergemem_judge(struct page *page)
{
	struct folio *folio;

	if (is_zone_device_page(page) || PageHWPoison(page))
		return MERGEMEM_REFUSED;
	if (mergemem_page_is_shared(page))
		return UNDECIDED;
	folio = page_folio(page);
	if (!folio_test_anon(folio) || folio_test_ksm(folio))
		return MERGEMEM_REFUSED;
	if (folio_test_large(folio))
		return MERGEMEM_HUGE;
	return UNDECIDED;
}

/*
 * The page behind a page-table entry, if its kind may be merged: returns
 * UNDECIDED, or the reason why not. For HUGE, too, there is a page. Caller holds
 * the PTL.
 */
u8 mergemem_look(struct merge_request *request, const struct merge_run *run,
	       const struct merge_page *page, pte_t entry, struct page **found)
{
	/* Splitting a huge page may have done it already (6.12). */
	if (pte_present(entry) && is_zero_pfn(pte_pfn(entry)) &&
	    group_of(request, page)->is_zero)
		return page->is_huge ? MERGEMEM_ZEROED : MERGEMEM_ALREADYSH;
	if (!pte_present(entry) || pte_special(entry))
		return mergemem_no_page(request, page);
	if (!vma_is_accessible(run->vma))
		return MERGEMEM_REFUSED;	/* PROT_NONE: set aside */
	if (pte_protnone(entry))
		return MERGEMEM_BUSY;	/* a NUMA hint; the next access ends it */
	*found = kernel_call(vm_normal_page)(run->vma, page->address, entry);
	if (!*found)
		return mergemem_no_page(request, page);
	return mergemem_judge(*found);
}

static void notify_start(struct mmu_notifier_range *range,
			 const struct merge_run *run)
{
	struct mm_struct *mm = run->vma->vm_mm;

	compat_notifier_range_init(range, run->vma, run->pages[0].address,
				   run->pages[run->count - 1].address +
					   PAGE_SIZE);
	might_sleep();
	/* Registration needs the mmap_lock for writing: start and end agree. */
	if (mm_has_notifiers(mm))
		kernel_call(__mmu_notifier_invalidate_range_start)(range);
}

static void notify_end(struct mmu_notifier_range *range)
{
	if (mm_has_notifiers(range->mm))
		compat_notifier_range_end(range);
}

/* After this no CPU and no secondary MMU has a translation of the range. */
static void flush(const struct mmu_notifier_range *range)
{
	kernel_call(flush_tlb_mm_range)(range->mm, range->start, range->end,
					PAGE_SHIFT, false);
	compat_flush_secondary(range);
	mergemem_count(&mergemem_counted.tlb_flushes, 1);
}

/*
 * Whether nothing but page tables, and the swap cache, refers to the page.
 *
 * Whoever wants to write to a page without going through a page-table entry
 * (O_DIRECT, io_uring, RDMA, VFIO) got hold of it through a writable entry and
 * keeps a reference. A page with a writable entry is exclusive: mapped by this
 * entry alone, so that its map count is 1 and stays 1, and any other reference
 * shows. The counts of a page that several processes map may move while they
 * are read (fork, exit), hence the two readings. To be mistaken then takes a
 * writer that kept a reference without a pin across a fork, of which the kernel
 * itself says that it may see its data go to either process.
 *
 * The swap cache's reference is told from others only while the folio is
 * locked, since its removal needs the lock. Trylock: the order is folio lock
 * before PTL. On success with *locked the caller unlocks.
 */
static bool only_mapped(struct folio *folio, bool *locked)
{
	int map_count = mergemem_map_count(&folio->page);
	int expected = map_count;

	*locked = false;
	if (folio_test_swapcache(folio)) {
		if (!folio_trylock(folio))
			return false;
		*locked = true;
		expected += folio_test_swapcache(folio);
	}
	/* Orders the clearing of the entry before; see GUP-fast above. */
	smp_mb();
	if (folio_ref_count(folio) == expected &&
	    mergemem_map_count(&folio->page) == map_count)
		return true;
	if (*locked)
		folio_unlock(folio);
	*locked = false;
	return false;
}

/*
 * Less than memcmp() does, which tests every word, to say which byte is the
 * greater one. Most of a merge is spent here.
 */
static bool equal_words(const u64 *a, const u64 *b)
{
	const u64 *end = a + PAGE_SIZE / sizeof(*a);
	unsigned int i;

	for (; a < end; a += 16, b += 16) {
		u64 difference = 0;

#pragma GCC unroll 16
		for (i = 0; i < 16; i++)
			difference |= a[i] ^ b[i];
		if (difference)
			return false;
	}
	return true;
}

static bool equal_bytes(struct page *a, struct page *b)
{
	void *bytes_a = kmap_local_page(a);
	void *bytes_b = kmap_local_page(b);
	bool equal = equal_words(bytes_a, bytes_b);

	kunmap_local(bytes_b);
	kunmap_local(bytes_a);
	return equal;
}

static bool zero_bytes(struct page *page)
{
	void *bytes = kmap_local_page(page);
	bool zero = !memchr_inv(bytes, 0, PAGE_SIZE);

	kunmap_local(bytes);
	return zero;
}

/* Whether a page may go: its bytes are those that will be in its place. */
bool mergemem_has_target_bytes(const struct merge_group *group,
			       struct page *page)
{
	return group->is_zero ? zero_bytes(page) :
				equal_bytes(page, group->target);
}

/*
 * Core mm's own last word on pins: a page that is exclusive to this mapping
 * must be made shareable before the mapping goes, and that fails when it may be
 * pinned. The entry is clear, as folio_try_share_anon_rmap_pte() asks. Called
 * after the compare, because it cannot be undone.
 */
static bool may_share(struct folio *folio, struct page *page)
{
	return !PageAnonExclusive(page) ||
	       !compat_try_share_anon_rmap(folio, page);
}

/*
 * The new entry: read-only and clean, all else as it was. That of the zero page
 * is special, as after a read fault in untouched memory: no reference, no rmap.
 */
static pte_t target_entry(struct vm_area_struct *vma, unsigned long address,
			  const struct merge_group *group, pte_t old)
{
	pte_t entry;

	if (group->is_zero)
		entry = pte_mkspecial(pfn_pte(page_to_pfn(ZERO_PAGE(address)),
					      vma->vm_page_prot));
	else
		entry = mk_pte(group->target, vma->vm_page_prot);
	entry = pte_wrprotect(entry);
	/* Merging is no access: whoever tracks accesses shall see none. */
	if (pte_soft_dirty(old))
		entry = pte_mksoft_dirty(entry);
	if (!pte_young(old))
		entry = pte_mkold(entry);
	/*
	 * With DEBUG_VM, khugepaged asserts in its second look at a page table
	 * that what was anonymous in its first one still is, and a merge may
	 * come between. It gives up before that at an entry of userfaultfd's
	 * write protection, which means nothing to others in a mapping without
	 * userfaultfd. Without DEBUG_VM it gives up at a page that is not on the
	 * LRU.
	 */
	if (IS_ENABLED(CONFIG_DEBUG_VM) && !group->is_zero)
		entry = compat_pte_mkuffd_wp(entry);
	return entry;
}

/*
 * Point of no return. The entry is clear and flushed, the PTL held: the new
 * entry needs no flush, because nobody can have a translation of a clear one.
 * The old page keeps the reference of its mapping; it is dropped after the
 * lock.
 */
static void install(const struct merge_run *run, unsigned long address,
		    pte_t *pte, pte_t old_entry, struct page *old,
		    const struct merge_group *group)
{
	struct vm_area_struct *vma = run->vma;

	if (!group->is_zero) {
		get_page(group->target);
		compat_add_file_rmap(group->target, vma);
	}
	set_pte_at(vma->vm_mm, address, pte,
		   target_entry(vma, address, group, old_entry));
	compat_remove_rmap(old, vma);
}

/* Zero pages are counted apart: what they free was no duplicate. */
static u8 success_of(const struct merge_group *group)
{
	return group->is_zero ? MERGEMEM_ZEROED : MERGEMEM_SUCCESS;
}

static u8 attach_anon(const struct merge_run *run, unsigned long address,
		      pte_t *pte, pte_t entry, struct page *old,
		      const struct merge_group *group)
{
	struct folio *folio = page_folio(old);
	u8 result = success_of(group);
	bool locked;

	if (!only_mapped(folio, &locked))
		return MERGEMEM_PINNED;
	if (!mergemem_has_target_bytes(group, old))
		result = MERGEMEM_NOTEQUAL;
	else if (!may_share(folio, old))
		result = MERGEMEM_PINNED;
	else
		install(run, address, pte, entry, old, group);

	/* When that was the last mapping, what the page still has goes too. */
	if (result == success_of(group) && !folio_mapped(folio)) {
		if (locked)
			kernel_call(folio_free_swap)(folio);
		else if (!group->is_zero)
			mergemem_shared_take_charge(group->target, old);
	}
	if (locked)
		folio_unlock(folio);
	return result;
}

static u8 attach_page(const struct merge_run *run, unsigned long address,
		      pte_t *pte, pte_t entry, struct page *old,
		      const struct merge_group *group)
{
	if (!group->is_zero && PageHWPoison(group->target))
		return MERGEMEM_REFUSED;
	if (!group->is_zero && mergemem_is_full(group->target))
		return MERGEMEM_MOREMAP;
	if (!mergemem_page_is_shared(old))
		return attach_anon(run, address, pte, entry, old, group);
	/*
	 * From one shared page to another. Nobody writes to a shared page, so
	 * references to it do not matter.
	 */
	if (!mergemem_has_target_bytes(group, old))
		return MERGEMEM_NOTEQUAL;
	install(run, address, pte, entry, old, group);
	return success_of(group);
}

/* What the entry alone tells of a page at its turn; see mergemem_look(). */
static u8 look_again(struct merge_request *request, const struct merge_run *run,
		     const struct merge_page *page, pte_t entry,
		     struct page **found)
{
	const struct merge_group *group = group_of(request, page);
	u8 result = mergemem_look(request, run, page, entry, found);

	if (result != UNDECIDED)
		return result;
	if (!group->is_zero && *found == group->target)
		return MERGEMEM_ALREADYSH;
	/* It may have been migrated since the survey. */
	if (group->node != NUMA_NO_NODE && group->node != page_to_nid(*found))
		return MERGEMEM_NODE;
	return UNDECIDED;
}

/* Step 1. Returns whether there is anything to flush. */
static bool clear_entries(struct merge_request *request,
			  const struct merge_run *run, pte_t *first)
{
	struct merge_batch *batch = request->batch;
	bool cleared = false;
	unsigned int i;

	for (i = 0; i < run->count; i++) {
		struct merge_page *page = &run->pages[i];
		u8 *result = result_of(request, page);
		pte_t *pte = first + ((page->address - run->pages[0].address) >>
				      PAGE_SHIFT);

		batch->old[i] = NULL;
		*result = look_again(request, run, page, ptep_get(pte),
				     &batch->old[i]);
		if (*result != UNDECIDED) {
			batch->old[i] = NULL;
			continue;
		}
		batch->entry[i] = ptep_get_and_clear(run->vma->vm_mm,
						     page->address, pte);
		cleared = true;
	}
	return cleared;
}

/* Steps 3 and 4. */
static void settle_entries(struct merge_request *request,
			   const struct merge_run *run, pte_t *first)
{
	struct merge_batch *batch = request->batch;
	struct mm_struct *mm = run->vma->vm_mm;
	long anon_pages = 0, file_pages = 0;
	unsigned int i;

	for (i = 0; i < run->count; i++) {
		struct merge_page *page = &run->pages[i];
		u8 *result = result_of(request, page);
		pte_t *pte = first + ((page->address - run->pages[0].address) >>
				      PAGE_SHIFT);

		if (!batch->old[i])
			continue;
		*result = attach_page(run, page->address, pte, batch->entry[i],
				      batch->old[i], group_of(request, page));
		if (*result != success_of(group_of(request, page))) {
			set_pte_at(mm, page->address, pte, batch->entry[i]);
			continue;
		}
		if (PageAnon(batch->old[i]))
			anon_pages--;
		else
			file_pages--;
		if (!group_of(request, page)->is_zero)
			file_pages++;
		batch->replaced[batch->replaced_count++] = batch->old[i];
	}
	/* Still under the PTL, so that nobody sees fewer pages than there are. */
	compat_add_mm_counter(mm, MM_FILEPAGES, file_pages);
	compat_add_mm_counter(mm, MM_ANONPAGES, anon_pages);
}

void mergemem_attach_run(struct merge_request *request,
		       const struct merge_run *run)
{
	struct merge_batch *batch = request->batch;
	struct mmu_notifier_range range;
	spinlock_t *ptl;
	unsigned int i;
	pte_t *pte;

	batch->replaced_count = 0;
	notify_start(&range, run);
	pte = mergemem_pte_lock(range.mm, range.start, &ptl);
	if (pte) {
		if (clear_entries(request, run, pte)) {
			flush(&range);
			settle_entries(request, run, pte);
		}
		pte_unmap_unlock(pte, ptl);
	} else {
		/* There was a page table in the survey; it is in motion. */
		for (i = 0; i < run->count; i++)
			*result_of(request, &run->pages[i]) = MERGEMEM_BUSY;
	}
	notify_end(&range);
	release_pages(batch->replaced, batch->replaced_count);
}
