// SPDX-License-Identifier: GPL-2.0
/*
 * Checksums: all that user space gets to know of a page.
 *
 * xxh64 with a secret seed runs over the page at memory speed; SipHash with a
 * secret key then turns its 64 bits into the 64 bits that leave the kernel. The
 * first makes equal pages equal; the second sees to it that nothing but
 * equality can be read off: what xxh64, which is no cryptographic function,
 * might tell of its seed or of the page stays behind SipHash. Both secrets are
 * drawn at load.
 *
 * A sample of some cache lines is hashed by a sum of its words, each times a
 * secret odd number of its own (multiply-add hashing, Dietzfelbinger 1996): a
 * difference in one word always shows, and a few lines are not worth the start
 * and the end of xxh64. SipHash stands behind it as well.
 *
 * A page that is read in full has its sample in the upper half of its checksum,
 * so that it can be told from the sample of another page whether it is worth
 * reading that one in full, too.
 *
 * Somebody who can shape the content of pages may make different pages collide
 * in xxh64. That costs a comparison, and the comparison decides.
 *
 * Pages are read under their page-table lock, in portions of 128 KiB (some
 * 20 µs): the lock keeps the page mapped, hence allocated, and no reference is
 * needed, which another client would take for I/O in flight.
 */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/random.h>
#include <linux/siphash.h>
#include <linux/xxhash.h>

#include "checksum.h"
#include "counters.h"
#include "shared.h"
#include "symbols.h"
#include "target.h"

#define LINES_PER_PAGE		(PAGE_SIZE / MERGEMEM_DEPTH_STEP_BYTES)
#define WORDS_PER_LINE		(MERGEMEM_DEPTH_STEP_BYTES / sizeof(u64))
#define BYTES_PER_LOCK		(128 * 1024)

static struct {
	u64 seed;
	siphash_key_t key;
	u8 order[LINES_PER_PAGE];	/* in which cache lines are sampled */
	u64 weights[LINES_PER_PAGE][WORDS_PER_LINE];	/* odd; in that order */
} secret __ro_after_init;

/**
 * mergemem_checksum_init - draw the secrets
 *
 * The order of lines is a random permutation (Fisher and Yates), so that
 * nobody can prepare pages that differ everywhere but in the sample.
 */
void __init mergemem_checksum_init(void)
{
	unsigned int i, other;

	get_random_bytes(&secret.seed, sizeof(secret.seed));
	get_random_bytes(&secret.key, sizeof(secret.key));
	get_random_bytes(secret.weights, sizeof(secret.weights));
	for (i = 0; i < LINES_PER_PAGE; i++)
		for (other = 0; other < WORDS_PER_LINE; other++)
			secret.weights[i][other] |= 1;
	for (i = 0; i < LINES_PER_PAGE; i++)
		secret.order[i] = i;
	for (i = LINES_PER_PAGE - 1; i; i--) {
		other = get_random_u32() % (i + 1);
		swap(secret.order[i], secret.order[other]);
	}
}

static u64 sample(const void *bytes, unsigned int depth_bytes)
{
	u64 sum = secret.seed + depth_bytes;
	unsigned int i, word;

	for (i = 0; i < depth_bytes / MERGEMEM_DEPTH_STEP_BYTES; i++) {
		const u64 *line = bytes + secret.order[i] *
						  MERGEMEM_DEPTH_STEP_BYTES;
		const u64 *weights = secret.weights[i];

#pragma GCC unroll 8
		for (word = 0; word < WORDS_PER_LINE; word++)
			sum += line[word] * weights[word];
	}
	return sum;
}

static u32 keyed(u64 hash)
{
	return siphash_1u64(hash, &secret.key);
}

static u64 checksum(const void *bytes, unsigned int depth_bytes)
{
	u64 upper, lower = 0;

	if (depth_bytes == PAGE_SIZE) {
		lower = keyed(xxh64(bytes, PAGE_SIZE, secret.seed));
		depth_bytes = MERGEMEM_DEPTH_SAMPLE_BYTES;
	}
	upper = keyed(sample(bytes, depth_bytes));
	return upper << 32 | lower;
}

static bool zero_filled(const u64 *words)
{
	/* Nearly every page shows in its first word that it is not. */
	return !words[0] && !memchr_inv(words, 0, PAGE_SIZE);
}

/* What is read of one run, and how much of it so far. */
struct reading {
	const struct mergemem_depths *depths;
	unsigned int bytes_under_lock;
	unsigned long pages_in_full;
	unsigned long pages_in_part;
};

static unsigned int depth_of(const struct mergemem_depths *depths,
			     unsigned long address, bool merged)
{
	unsigned long page;

	if (!depths->full)
		return depths->others_bytes;
	page = (address - depths->full_start) >> PAGE_SHIFT;
	if (depths->full[page / 8] & BIT(page % 8))
		return PAGE_SIZE;
	return merged ? 0 : depths->others_bytes;
}

static void read_page(struct reading *reading, struct page *page,
		      unsigned int depth_bytes, struct mergemem_record *record)
{
	void *bytes = kmap_local_page(page);

	record->checksum = checksum(bytes, depth_bytes);
	if (depth_bytes == PAGE_SIZE)
		reading->pages_in_full++;
	else
		reading->pages_in_part++;
	reading->bytes_under_lock += depth_bytes;
	if ((record->state == MERGEMEM_STATE_ANON ||
	     record->state == MERGEMEM_STATE_HUGE) && zero_filled(bytes)) {
		record->state = MERGEMEM_STATE_ZERO;
		reading->bytes_under_lock += PAGE_SIZE;
	}
	kunmap_local(bytes);
}

/* Caller holds the lock of the page table that maps the page. */
static enum mergemem_state page_state(struct page *page, struct folio *folio)
{
	if (is_zone_device_page(page) || PageHWPoison(page))
		return MERGEMEM_STATE_REFUSED;
	if (!folio_test_anon(folio))
		return mergemem_page_is_shared(page) ? MERGEMEM_STATE_MERGED :
						       MERGEMEM_STATE_REFUSED;
	if (folio_test_ksm(folio))
		return MERGEMEM_STATE_REFUSED;
	if (folio_test_large(folio))
		return MERGEMEM_STATE_HUGE;
	if (folio_maybe_dma_pinned(folio))
		return MERGEMEM_STATE_PINNED;
	return MERGEMEM_STATE_ANON;
}

static void record_page(struct reading *reading, struct page *page,
			unsigned long address, struct mergemem_record *record)
{
	struct folio *folio = page_folio(page);
	unsigned int depth_bytes;

	record->state = page_state(page, folio);
	if (record->state == MERGEMEM_STATE_REFUSED)
		return;
	record->map_count = compat_map_count(page);
	record->order = folio_order(folio);
	depth_bytes = depth_of(reading->depths, address,
			       record->state == MERGEMEM_STATE_MERGED);
	if (depth_bytes)
		read_page(reading, page, depth_bytes, record);
}

/*
 * Mergeable mappings are anonymous, and none of PFNs: what is not special there is
 * an ordinary page, as vm_normal_page() would find at greater length.
 */
static void record_pte(struct reading *reading, pte_t entry,
		       unsigned long address, struct mergemem_record *record)
{
	if (pte_none(entry)) {
		record->state = MERGEMEM_STATE_ABSENT;
	} else if (!pte_present(entry)) {
		record->state = MERGEMEM_STATE_SWAPPED;
	} else if (pte_special(entry)) {
		record->state = is_zero_pfn(pte_pfn(entry)) ?
					MERGEMEM_STATE_ZERO_PAGE :
					MERGEMEM_STATE_REFUSED;
	} else {
		record_page(reading, pte_page(entry), address, record);
	}
}

static bool lock_held_long(const struct reading *reading)
{
	return reading->bytes_under_lock >= BYTES_PER_LOCK;
}

/* Both fill functions return how many pages they came to, at least one. */

static unsigned int fill_from_table(struct reading *reading, pte_t *pte,
				    unsigned long address, unsigned int pages,
				    struct mergemem_record *records)
{
	unsigned int i = 0;

	do {
		record_pte(reading, ptep_get(pte + i), address + i * PAGE_SIZE,
			   &records[i]);
	} while (++i < pages && !lock_held_long(reading));
	return i;
}

/*
 * A huge page: one entry for 512 pages. The huge zero page is the one that is
 * not anonymous.
 */
static unsigned int fill_from_huge(struct reading *reading,
				   struct mm_struct *mm, unsigned long address,
				   unsigned int pages,
				   struct mergemem_record *records)
{
	spinlock_t *ptl;
	struct page *page = mergemem_huge_lock(mm, address, &ptl);
	unsigned int i = 0;

	if (!page)
		return pages;
	do {
		if (PageAnon(page + i))
			record_page(reading, page + i, address + i * PAGE_SIZE,
				    &records[i]);
		else
			records[i].state = MERGEMEM_STATE_ZERO_PAGE;
	} while (++i < pages && !lock_held_long(reading));
	spin_unlock(ptl);
	return i;
}

/**
 * mergemem_checksum_next_run - find the next run of pages worth a message
 * @mm: whose pages; the caller holds the mmap_lock
 * @start: where to look from
 * @end: where to stop
 * @run: filled in
 *
 * A run stays within one page table and one mapping; a run of refused pages is
 * as long as its mapping. Skips what is not mapped.
 *
 * Return: 0, or -ENOENT when there is nothing more before @end
 */
int mergemem_checksum_next_run(struct mm_struct *mm, unsigned long start,
			       unsigned long end, struct mergemem_run *run)
{
	while (start < end) {
		struct vm_area_struct *vma = find_vma(mm, start);
		unsigned long stop;

		if (!vma || vma->vm_start >= end)
			return -ENOENT;
		start = max(start, vma->vm_start);
		stop = min(end, vma->vm_end);
		run->address = start;
		run->refused = !mergemem_vma_mergeable(vma);
		if (run->refused) {
			run->pages = (stop - start) >> PAGE_SHIFT;
			return 0;
		}
		if (mergemem_table_at(mm, start, &stop)) {
			run->pages = (stop - start) >> PAGE_SHIFT;
			return 0;
		}
		start = stop;
		cond_resched();
	}
	return -ENOENT;
}

/**
 * mergemem_checksum_fill - write the records of a run
 * @mm: whose pages
 * @run: from mergemem_checksum_next_run(), under the same mmap_lock
 * @depths: how much of each page enters its checksum
 * @records: one per page of the run
 */
void mergemem_checksum_fill(struct mm_struct *mm, const struct mergemem_run *run,
			    const struct mergemem_depths *depths,
			    struct mergemem_record *records)
{
	struct reading reading = { .depths = depths };
	unsigned long done = 0;

	memset(records, 0, run->pages * sizeof(*records));
	while (done < run->pages) {
		unsigned long address = run->address + done * PAGE_SIZE;
		unsigned int left = run->pages - done;
		spinlock_t *ptl;
		pte_t *pte = mergemem_pte_lock(mm, address, &ptl);

		reading.bytes_under_lock = 0;
		if (pte) {
			done += fill_from_table(&reading, pte, address, left,
						records + done);
			pte_unmap_unlock(pte, ptl);
		} else {
			done += fill_from_huge(&reading, mm, address, left,
					       records + done);
		}
		cond_resched();
	}
	mergemem_count(&mergemem_counted.checksummed_pages,
		       reading.pages_in_full);
	mergemem_count(&mergemem_counted.sampled_pages, reading.pages_in_part);
}
