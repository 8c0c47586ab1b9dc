// SPDX-License-Identifier: GPL-2.0
/*
 * Shared pages: what several processes map after a merge.
 *
 * A shared page is a fresh, unmovable page that belongs to nobody but the page
 * tables that map it: one reference per mapping, with a file rmap, as a driver
 * page in a private mapping has (vm_insert_page()). Core mm does the rest: a
 * write fault copies it into an ordinary anonymous page, fork takes another
 * reference, unmap drops one, and the last one frees it.
 *
 * So the module keeps no reference and can be unloaded at any time. What it
 * keeps is a bitmap with one bit per page frame, set for every shared page that
 * was made and cleared when a walk finds that the page is gone: 1 bit per 4 KiB
 * frame is 2^34 / 2^12 / 8 = 512 KiB per 16 GiB, 2 MiB per 64 GiB. A bit is a
 * hint; the mark and the map count of the page itself are the truth.
 */
#include <linux/bitmap.h>
#include <linux/highmem.h>
#include <linux/memory_hotplug.h>
#include <linux/mmzone.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/vmalloc.h>

#include "shared.h"
#include "symbols.h"

unsigned int mergemem_max_mappings = MERGEMEM_MAX_MAPPINGS_DEFAULT;
unsigned long mergemem_max_shared_bytes = MERGEMEM_SHARED_BYTES_DEFAULT;

static unsigned long *shared_frames;
static unsigned long shared_frames_bits;

/* One walk over the bitmap at a time is enough. */
static DEFINE_MUTEX(walk_lock);

/* Bits set: never less than the true number of shared pages. */
static atomic_long_t shared_frames_set;

static void frame_set(unsigned long pfn)
{
	if (!test_and_set_bit(pfn, shared_frames))
		atomic_long_inc(&shared_frames_set);
}

static void frame_clear(unsigned long pfn)
{
	if (test_and_clear_bit(pfn, shared_frames))
		atomic_long_dec(&shared_frames_set);
}

static bool limit_reached(void)
{
	unsigned long limit_bytes = READ_ONCE(mergemem_max_shared_bytes);

	return limit_bytes && atomic_long_read(&shared_frames_set) >=
				      limit_bytes >> PAGE_SHIFT;
}

/**
 * mergemem_shared_reclaim_room - forget pages that are gone, if that matters
 *
 * Bits of pages that were freed count against max_shared_bytes until a walk
 * finds them. The walk looks at all shared pages, so this is called once a
 * request, and walks only when the limit seems to be reached.
 */
void mergemem_shared_reclaim_room(void)
{
	struct mergemem_totals totals;

	if (limit_reached())
		mergemem_shared_totals(&totals);
}

/**
 * mergemem_shared_create - make a shared page with the bytes of another page
 * @donor: an anonymous page, with a reference; nobody stops its owner from
 *	writing while it is copied. That is harmless: every page that shall map
 *	the new one is compared with it first, the donor's own too.
 * @any_node: take a page of another NUMA node where the donor's has none
 *
 * The page is allocated from unmovable memory, away from what compaction wants
 * to move, and without trying so hard that somebody would get killed for it.
 *
 * Return: the page with one reference, to be dropped by put_page(): the page is
 * freed then unless somebody maps it. NULL when there is no memory, or no room
 * below max_shared_bytes.
 */
struct page *mergemem_shared_create(struct page *donor, bool any_node)
{
	gfp_t gfp = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN;
	struct page *page;
	unsigned long pfn;

	if (limit_reached())
		return NULL;
	if (!any_node)
		gfp |= __GFP_THISNODE;
	page = alloc_pages_node(page_to_nid(donor), gfp, 0);
	if (!page)
		return NULL;
	pfn = page_to_pfn(page);
	if (pfn >= shared_frames_bits) {
		/* Memory added after the module was loaded. */
		__free_page(page);
		return NULL;
	}
	copy_highpage(page, donor);
	__SetPageUptodate(page);
	/* The mark before the bit: forget_if_gone() looks the other way round. */
	set_page_private(page, MERGEMEM_MARK ^ pfn);
	frame_set(pfn);
	return page;
}

/**
 * mergemem_shared_take_charge - let a shared page be charged for another page
 * @shared: a shared page that the caller has just mapped: the page-table lock
 *	keeps its map count above zero
 * @old: the anonymous page whose place it took, with the reference of the
 *	mapping that has gone
 *
 * The first page that is freed in favour of a shared page hands its memory
 * cgroup's charge over instead of giving it back. Nothing is charged anew: no
 * limit can be hit, nobody gets killed, and the usage of a cgroup only falls.
 * The word that is moved stands for the charge and for the reference on the
 * cgroup that goes with it; freeing the shared page drops both, as for any page.
 *
 * The LRU list that a page is on follows from its charge, so @old leaves its
 * list first. Whoever isolates it (reclaim, migration) clears PG_lru, and only
 * one can. From then on nobody can begin anything with it; who has begun has a
 * reference: reclaim that put it into the swap cache while its entry was clear,
 * another process's unmapping, which counts the cgroup's pages after the map
 * count has dropped, or a migration that has it mapped again by now. So with any
 * reference but two it goes back to its list with its charge, and the next page
 * is asked. What isolation leaves set must not be seen when the page is freed.
 *
 * The other party is a request that attaches a page to the same @shared under
 * another lock: cmpxchg() lets one charge in, the loser's goes with its page.
 */
void mergemem_shared_take_charge(struct page *shared, struct page *old)
{
#ifdef CONFIG_MEMCG
	struct folio *from = page_folio(old), *to = page_folio(shared);
	unsigned long charge;

	if (!READ_ONCE(from->memcg_data) || READ_ONCE(to->memcg_data) ||
	    !compat_folio_isolate_lru(from))
		return;
	if (folio_mapped(from) || folio_ref_count(from) != 2) {
		folio_add_lru(from);
		folio_put(from);
		return;
	}
	charge = from->memcg_data;
	folio_clear_active(from);
	folio_clear_unevictable(from);
	if (!cmpxchg(&to->memcg_data, 0, charge)) {
		from->memcg_data = 0;
		/*
		 * It was counted as mapped when it belonged to nobody, and will
		 * be uncounted as the cgroup's.
		 */
		mod_lruvec_page_state(shared, NR_FILE_MAPPED, 1);
		mod_node_page_state(folio_pgdat(to), NR_FILE_MAPPED, -1);
	}
	folio_put(from);	/* the reference of its isolation */
#endif
}

/*
 * Looks at a frame without any reference: the page may be freed, and allocated
 * by somebody else, at any moment. struct page stays readable, a foreign page
 * has no mark, and a free one no references, so the worst outcome is an answer
 * about a page that came or went at this moment.
 */
static bool frame_alive(unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	return page && mergemem_page_is_shared(page) && page_ref_count(page) > 0;
}

/*
 * Clears the bit of a page that is gone. The other party is a request that is
 * given the same frame again: it marks the page, then sets the bit. Either its
 * bit comes after the clearing and stays, or the second look sees its mark.
 */
static void forget_if_gone(unsigned long pfn)
{
	if (frame_alive(pfn))
		return;
	frame_clear(pfn);	/* a full barrier */
	if (frame_alive(pfn))
		frame_set(pfn);
}

/**
 * mergemem_shared_totals - count shared pages and their mappings as of now
 * @totals: filled in
 *
 * Exact when nothing changes meanwhile. A page that was made but is not mapped
 * (yet) is not counted.
 */
void mergemem_shared_totals(struct mergemem_totals *totals)
{
	unsigned long pfn;

	*totals = (struct mergemem_totals){};
	mutex_lock(&walk_lock);
	for_each_set_bit(pfn, shared_frames, shared_frames_bits) {
		int mappings = 0;

		if (frame_alive(pfn))
			mappings = mergemem_map_count(pfn_to_page(pfn));
		else
			forget_if_gone(pfn);
		if (mappings > 0) {
			totals->shared_pages++;
			totals->shared_mappings += mappings;
		}
		cond_resched();
	}
	mutex_unlock(&walk_lock);
}

static unsigned long end_of_memory_pfn(void)
{
	unsigned long end_pfn = 0;
	int nid;

	for_each_online_node(nid)
		end_pfn = max(end_pfn, node_end_pfn(nid));
	return end_pfn;
}

/* Finds the pages that an earlier load of the module left behind. */
static void recognise(void)
{
	unsigned long pfn;

	for (pfn = 0; pfn < shared_frames_bits; pfn++) {
		if (frame_alive(pfn))
			frame_set(pfn);
		if (!(pfn % 4096))
			cond_resched();
	}
}

int mergemem_shared_init(void)
{
	if (mergemem_max_shared_bytes == MERGEMEM_SHARED_BYTES_DEFAULT)
		mergemem_max_shared_bytes = (totalram_pages() / 2) << PAGE_SHIFT;
	shared_frames_bits = end_of_memory_pfn();
	shared_frames = __vmalloc(BITS_TO_LONGS(shared_frames_bits) *
				  sizeof(long),
				  GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
	if (!shared_frames)
		return -ENOMEM;
	recognise();
	return 0;
}

/* The shared pages stay with the processes that map them. */
void mergemem_shared_exit(void)
{
	vfree(shared_frames);
}
