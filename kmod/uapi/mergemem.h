/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The contract between mergemem.ko and user space: generic netlink family
 * "mergemem", contract version 3.
 *
 * User space searches, the kernel decides. A client sees checksums, map counts
 * and states of pages, never their bytes nor their frame numbers; it names
 * pages that it believes to be equal, and the kernel compares them itself.
 *
 * Who may talk to it: a socket opened by, and used by, a task that has
 * CAP_SYS_PTRACE in the initial user namespace; anybody else gets -EPERM. Each
 * process named in a request is asked for with the access check of
 * ptrace(PTRACE_ATTACH), so that security modules have their say.
 *
 * How errors arrive: a malformed request is refused whole, before anything has
 * happened, with a negative errno and an extended-ack text that says what is
 * wrong. A page that cannot be merged is no error: it gets a result code of
 * its own, is left exactly as it was, and never fails its neighbours.
 *
 * How numbers grow: values are appended, never reused. Structures grow at
 * their end; a client takes the length it got, and reads missing fields as 0.
 * All values are in host byte order. Pages are 4096 bytes.
 *
 *   command    kind  request                      reply
 *   ---------  ----  ---------------------------  ----------------------------
 *   INFO       do    -                            CONTRACT_VERSION
 *                                                 MODULE_VERSION FEATURES
 *                                                 LIMITS COUNTERS TOTALS
 *   CHECKSUM   dump  PROCESSES (exactly one)      per message: ADDRESS and
 *                    ADDRESS PAGES DEPTH          either RECORDS or REFUSED
 *                    [FULL_PAGES]
 *   MERGE      do    PROCESSES CANDIDATES         RESULTS
 *                    [FLAGS] [SPLIT_PERCENT]
 *   UNMERGE    do    PROCESSES (exactly one)      UNMERGED NEXT
 *                    ADDRESS PAGES [COUNT_ONLY]
 */
#ifndef _UAPI_MERGEMEM_H
#define _UAPI_MERGEMEM_H

#include <linux/types.h>

#define MERGEMEM_FAMILY_NAME		"mergemem"
#define MERGEMEM_CONTRACT_VERSION	3

/* Limits of one request; INFO reports them in struct mergemem_limits. */
#define MERGEMEM_MAX_PROCESSES		1024	/* entries in PROCESSES */
#define MERGEMEM_MAX_CANDIDATES		4000	/* entries in CANDIDATES */
#define MERGEMEM_MAX_UNMERGE_PAGES	16384	/* pages changed by one UNMERGE */
#define MERGEMEM_MAX_FULL_PAGES		65536	/* PAGES of a CHECKSUM with FULL_PAGES */
#define MERGEMEM_DEPTH_STEP_BYTES	64	/* DEPTH is a multiple of this */
#define MERGEMEM_DEPTH_SAMPLE_BYTES	256	/* what a full checksum has in its upper half */
#define MERGEMEM_DEPTH_FULL_BYTES	4096	/* the whole page */

/**
 * enum mergemem_command - what a client can ask for
 *
 * @MERGEMEM_CMD_INFO: versions, limits, counters since load, live totals.
 *
 * @MERGEMEM_CMD_CHECKSUM: a dump over PAGES pages from ADDRESS of one process.
 *	Each message covers a run of pages that starts at its own ADDRESS:
 *	RECORDS holds one struct mergemem_record per page, REFUSED the number of
 *	pages that lie in a mapping of a kind that is never merged. Pages
 *	for which no message arrives are absent: nothing was ever mapped there.
 *	Runs arrive in ascending order. Messages fill the receive buffer that
 *	the client offers; 32 KiB or more is best.
 *	The checksum is keyed with a secret drawn when the module is loaded:
 *	equal pages have equal checksums (for one DEPTH and one load of the
 *	module) and nothing else can be learnt from it. Two different pages may
 *	share a checksum, which costs a comparison, never a wrong merge.
 *	Below MERGEMEM_DEPTH_FULL_BYTES the lower 32 bits are 0. Those of a page
 *	read in full are of all its bytes; its upper 32 bits are those that it
 *	has at MERGEMEM_DEPTH_SAMPLE_BYTES, so one that was read in full is
 *	compared by them with one that was sampled.
 *	With FULL_PAGES the pages of its set bits are read in full, whatever they
 *	are. Of the others DEPTH bytes are read, unless they are merged pages
 *	already: these are only counted, with state and map count.
 *	Errors: -ESRCH no such process (any more), -EACCES access denied or the
 *	process is not dumpable, -EBUSY its mmap_lock could not be had, or it
 *	is in the middle of an exec. All errors of a dump, those of a malformed
 *	request too, may arrive with its NLMSG_DONE. -ECANCELED: a signal.
 *
 * @MERGEMEM_CMD_MERGE: make the pages of each group share one frame. RESULTS
 *	holds one enum mergemem_result per candidate, in the order of the
 *	request. Candidates of a group need not be next to each other; sorted
 *	by process and address they are cheapest. If one
 *	page of a group is a merged page already, the others join it. Pages that
 *	differ from the rest of their group, or lie on another NUMA node, are
 *	tried among themselves, in up to three more rounds.
 *	A candidate of MERGEMEM_GROUP_ZERO belongs to no group: if it is filled
 *	with zeros, the kernel's zero page takes its place. That reveals
 *	nothing of anybody else, so it is done whoever owns the page.
 *	Pages of a huge page or large folio are merged only with SPLIT_PERCENT:
 *	the folio is split if that share of its pages at least are candidates
 *	of this request and have the bytes of their groups.
 *
 * @MERGEMEM_CMD_UNMERGE: give the merged pages within PAGES pages from ADDRESS
 *	private frames of their own again. Stops after
 *	MERGEMEM_MAX_UNMERGE_PAGES; NEXT is the address to go on from, or the
 *	end of the range when all is done.
 *	Pages that are write-protected through userfaultfd stay merged.
 *	With COUNT_ONLY nothing is changed: UNMERGED is the number of merged
 *	pages in the range. Zero pages stay: they take no frame, hold nobody's
 *	content, and look like those that reading untouched memory gives.
 *	Errors: as CHECKSUM, -ECANCELED on a signal, and -ENOMEM, before anything was
 *	changed, when the memory that is available, or what the limits of the
 *	process's cgroup leave, would not suffice for the range. Page cache
 *	that a cgroup could give up counts as used.
 */
enum mergemem_command {
	MERGEMEM_CMD_UNSPEC,
	MERGEMEM_CMD_INFO,
	MERGEMEM_CMD_CHECKSUM,
	MERGEMEM_CMD_MERGE,
	MERGEMEM_CMD_UNMERGE,
	__MERGEMEM_CMD_MAX,
};
#define MERGEMEM_CMD_MAX (__MERGEMEM_CMD_MAX - 1)

/**
 * enum mergemem_attribute - what messages are made of
 *
 * @MERGEMEM_A_PAD: alignment only, no content
 * @MERGEMEM_A_CONTRACT_VERSION: u32, MERGEMEM_CONTRACT_VERSION of the module
 * @MERGEMEM_A_MODULE_VERSION: string, the version of the module
 * @MERGEMEM_A_FEATURES: u64, bits of enum mergemem_feature
 * @MERGEMEM_A_LIMITS: struct mergemem_limits
 * @MERGEMEM_A_COUNTERS: struct mergemem_counters
 * @MERGEMEM_A_TOTALS: struct mergemem_totals
 * @MERGEMEM_A_PROCESSES: array of struct mergemem_process, 1 to
 *	MERGEMEM_MAX_PROCESSES entries
 * @MERGEMEM_A_ADDRESS: u64, user address, a multiple of the page size
 * @MERGEMEM_A_PAGES: u64, number of pages, at least 1; the range must lie
 *	within the user address space
 * @MERGEMEM_A_DEPTH: u32, how many bytes of each page enter the checksum:
 *	a multiple of MERGEMEM_DEPTH_STEP_BYTES up to MERGEMEM_DEPTH_FULL_BYTES.
 *	Less than the whole page is a sample of cache lines in a secret order:
 *	cheap, enough to see that a page is unique, not enough to nominate it.
 *	0: states and map counts alone.
 * @MERGEMEM_A_RECORDS: array of struct mergemem_record
 * @MERGEMEM_A_REFUSED: u64, number of pages
 * @MERGEMEM_A_CANDIDATES: array of struct mergemem_candidate, 1 to
 *	MERGEMEM_MAX_CANDIDATES entries
 * @MERGEMEM_A_RESULTS: array of u8, enum mergemem_result
 * @MERGEMEM_A_UNMERGED: u64, number of pages that have frames of their own now
 * @MERGEMEM_A_NEXT: u64, user address
 * @MERGEMEM_A_FLAGS: u32, bits of enum mergemem_merge_flag
 * @MERGEMEM_A_SPLIT_PERCENT: u32, 1 to 100; without it nothing is split
 * @MERGEMEM_A_COUNT_ONLY: flag, no content
 * @MERGEMEM_A_FULL_PAGES: bitmap over PAGES, which are MERGEMEM_MAX_FULL_PAGES at
 *	most: bit n % 8 of byte n / 8 is the page n pages from ADDRESS. As many
 *	bytes as that takes.
 */
enum mergemem_attribute {
	MERGEMEM_A_UNSPEC,
	MERGEMEM_A_PAD,
	MERGEMEM_A_CONTRACT_VERSION,
	MERGEMEM_A_MODULE_VERSION,
	MERGEMEM_A_FEATURES,
	MERGEMEM_A_LIMITS,
	MERGEMEM_A_COUNTERS,
	MERGEMEM_A_TOTALS,
	MERGEMEM_A_PROCESSES,
	MERGEMEM_A_ADDRESS,
	MERGEMEM_A_PAGES,
	MERGEMEM_A_DEPTH,
	MERGEMEM_A_RECORDS,
	MERGEMEM_A_REFUSED,
	MERGEMEM_A_CANDIDATES,
	MERGEMEM_A_RESULTS,
	MERGEMEM_A_UNMERGED,
	MERGEMEM_A_NEXT,
	MERGEMEM_A_FLAGS,
	MERGEMEM_A_SPLIT_PERCENT,
	MERGEMEM_A_COUNT_ONLY,
	MERGEMEM_A_FULL_PAGES,
	__MERGEMEM_A_MAX,
};
#define MERGEMEM_A_MAX (__MERGEMEM_A_MAX - 1)

/**
 * enum mergemem_feature - what this load of the module does
 *
 * @MERGEMEM_FEATURE_CROSS_UID: loaded with allow_cross_uid=1: processes of
 *	different real users may share pages
 * @MERGEMEM_FEATURE_SPLIT: SPLIT_PERCENT has an effect: the kernel has
 *	transparent huge pages
 */
enum mergemem_feature {
	MERGEMEM_FEATURE_CROSS_UID = 1 << 0,
	MERGEMEM_FEATURE_SPLIT = 1 << 1,
};

/**
 * enum mergemem_merge_flag - how a MERGE request wants its pages merged
 *
 * @MERGEMEM_MERGE_ANY_NODE: pages of different NUMA nodes may share a frame.
 *	Without it a group's pages share within the node of the first one, in a
 *	frame of that node, and those of another node among themselves.
 */
enum mergemem_merge_flag {
	MERGEMEM_MERGE_ANY_NODE = 1 << 0,
};
#define MERGEMEM_MERGE_FLAGS_ALL	MERGEMEM_MERGE_ANY_NODE

/**
 * enum mergemem_process_flag - permissions that a client gives with a process
 *
 * @MERGEMEM_PROCESS_UNDUMPABLE: take the process although it is not dumpable
 *	(prctl(PR_SET_DUMPABLE), or it changed its user id without exec)
 */
enum mergemem_process_flag {
	MERGEMEM_PROCESS_UNDUMPABLE = 1 << 0,
};
#define MERGEMEM_PROCESS_FLAGS_ALL	MERGEMEM_PROCESS_UNDUMPABLE

/**
 * struct mergemem_process - names a process beyond doubt
 *
 * @pid: thread group id, as seen in the caller's pid namespace
 * @flags: bits of enum mergemem_process_flag; other bits are refused
 * @start_time: when it started, in clock ticks since boot, as field 22 of
 *	/proc/PID/stat has it outside of time namespaces; a recycled pid has
 *	another one and is not found
 */
struct mergemem_process {
	__u32 pid;
	__u32 flags;
	__u64 start_time;
};

/**
 * struct mergemem_candidate - one page that is nominated for merging
 *
 * @address: user address, a multiple of the page size
 * @process: index into PROCESSES
 * @group: pages that carry the same number are believed to be equal; numbers
 *	are below the number of candidates. MERGEMEM_GROUP_ZERO: the page is
 *	believed to be filled with zeros.
 */
struct mergemem_candidate {
	__u64 address;
	__u32 process;
	__u32 group;
};

#define MERGEMEM_GROUP_ZERO		0xffffffffU

/**
 * enum mergemem_state - what CHECKSUM found in the place of a page
 *
 * @MERGEMEM_STATE_ABSENT: nothing is mapped
 * @MERGEMEM_STATE_SWAPPED: on swap, or on its way (migrating)
 * @MERGEMEM_STATE_ZERO_PAGE: the kernel's zero page; it takes no frame
 * @MERGEMEM_STATE_ANON: an ordinary anonymous page, with checksum
 * @MERGEMEM_STATE_ZERO: an anonymous page that is filled with zeros (told at
 *	any depth but 0), with checksum; of a large folio if the order says so
 * @MERGEMEM_STATE_MERGED: a merged page, with checksum if it was read;
 *	map_count mappings share it
 * @MERGEMEM_STATE_HUGE: part of a huge page or large folio, with checksum;
 *	merged only where the request lets it be split
 * @MERGEMEM_STATE_PINNED: in use by I/O, with checksum; not merged meanwhile
 * @MERGEMEM_STATE_REFUSED: a page of another kind: KSM's, a file's, a device's
 */
enum mergemem_state {
	MERGEMEM_STATE_ABSENT,
	MERGEMEM_STATE_SWAPPED,
	MERGEMEM_STATE_ZERO_PAGE,
	MERGEMEM_STATE_ANON,
	MERGEMEM_STATE_ZERO,
	MERGEMEM_STATE_MERGED,
	MERGEMEM_STATE_HUGE,
	MERGEMEM_STATE_PINNED,
	MERGEMEM_STATE_REFUSED,
	__MERGEMEM_STATE_COUNT,
};

/**
 * struct mergemem_record - one page as CHECKSUM saw it
 *
 * @checksum: keyed checksum; 0 where the state says that there is none, and
 *	where the page was not read
 * @map_count: how many page-table entries map the frame
 * @state: enum mergemem_state
 * @order: the page belongs to a folio of 2^order pages; 9 is a huge page
 */
struct mergemem_record {
	__u64 checksum;
	__u32 map_count;
	__u16 state;
	__u16 order;
};

/**
 * enum mergemem_result - what became of one candidate
 *
 * The first eight are those of mergemem 0.05 (1998), where a request named two
 * pages: 1 is now the first candidate of a group in the order of the request,
 * 2 any other one.
 *
 * @MERGEMEM_SUCCESS: the page now shares the frame of its group
 * @MERGEMEM_NOTASK1: the process of the group's first page is gone, is a
 *	kernel thread, or its pid belongs to another process by now
 * @MERGEMEM_NOTASK2: the same for another page of the group
 * @MERGEMEM_NOPAGE1: at the address of the group's first page there is no page
 *	in memory: nothing is mapped, or it is swapped, or it is the zero page
 * @MERGEMEM_NOPAGE2: the same for another page of the group
 * @MERGEMEM_ALREADYSH: it shares the frame of its group already, or another
 *	shared frame that is full
 * @MERGEMEM_MOREMAP: the shared frame has as many mappings as it may have
 *	(module parameter max_mappings)
 * @MERGEMEM_NOTEQUAL: its bytes differ from those of its group
 * @MERGEMEM_BUSY: the process or the page was in a transition; try later
 * @MERGEMEM_PINNED: somebody besides its mappings uses the page: I/O, mostly
 * @MERGEMEM_REFUSED: a process, mapping or page of a kind that is never merged
 * @MERGEMEM_DOMAIN: the process has another real user than its group's first
 * @MERGEMEM_NOMEM: no memory for the shared frame, or max_shared_bytes is
 *	reached
 * @MERGEMEM_HUGE: part of a huge page or large folio that is not to be split, or
 *	of which too few pages could be merged, or that could not be split now
 * @MERGEMEM_ALONE: the page is fine, but no other page of its group was
 * @MERGEMEM_ZEROED: the kernel's zero page has taken the place of the page
 * @MERGEMEM_NODE: on another NUMA node than its group
 */
enum mergemem_result {
	MERGEMEM_SUCCESS,
	MERGEMEM_NOTASK1,
	MERGEMEM_NOTASK2,
	MERGEMEM_NOPAGE1,
	MERGEMEM_NOPAGE2,
	MERGEMEM_ALREADYSH,
	MERGEMEM_MOREMAP,
	MERGEMEM_NOTEQUAL,
	MERGEMEM_BUSY,
	MERGEMEM_PINNED,
	MERGEMEM_REFUSED,
	MERGEMEM_DOMAIN,
	MERGEMEM_NOMEM,
	MERGEMEM_HUGE,
	MERGEMEM_ALONE,
	MERGEMEM_ZEROED,
	MERGEMEM_NODE,
	__MERGEMEM_RESULT_COUNT,
};

/* What one request may hold; see the constants of the same names above. */
struct mergemem_limits {
	__u32 max_processes;
	__u32 max_candidates;
	__u32 max_unmerge_pages;
	__u32 max_mappings;		/* per shared page: MOREMAP beyond it */
	__u64 max_shared_bytes;		/* NOMEM beyond it; 0: no limit */
};

/* Counted since the module was loaded. */
struct mergemem_counters {
	__u64 checksummed_pages;	/* pages read in full for CHECKSUM */
	__u64 sampled_pages;		/* pages read in part for CHECKSUM */
	__u64 merge_requests;		/* MERGE requests carried out */
	__u64 unmerged_pages;		/* pages given back their own frame */
	__u64 tlb_flushes;		/* TLB flushes, one per page-table batch */
	__u64 lru_drains;		/* times all CPUs drained their LRU lists */
	__u64 results[32];		/* candidates by enum mergemem_result */
	__u64 split_folios;		/* huge pages and large folios split */
	__u64 split_failures;		/* that should have been, but were in use */
};

/* What is shared right now, by whichever load of the module. */
struct mergemem_totals {
	__u64 shared_pages;		/* frames that are shared pages */
	__u64 shared_mappings;		/* page-table entries that map them */
};

#endif /* _UAPI_MERGEMEM_H */
