// SPDX-License-Identifier: GPL-2.0
/*
 * Where memory is new, where sharing breaks, and which processes come and go.
 *
 * BCC compiles this file (mergemem_agent/hint_program.py), with these set by cflags:
 *
 *   MERGEMEM_REGIONS       regions that each of the two maps of counts can hold
 *   MERGEMEM_TARGETS       processes that can be watched at once
 *   MERGEMEM_EVENT_PAGES   size of the ring buffer, a power of two
 *   MERGEMEM_SAMPLING_BITS at most one fault in two to the power of this is counted
 *
 * There is no header of the kernel's here: each would cost seconds of compiling, and break with
 * some kernel. All that uses a map is in this file, since BCC rewrites no other.
 */
#include "fault.h"
#include "region.h"
#include "sample.h"

/* include/uapi/linux/sched.h */
#define CLONE_THREAD 0x00010000

/* Written by the agent, but for `wake`, which a program clears. */
struct settings {
	u32 epoch; /* 0 or 1: which map of counts is written to */
	u32 salt, highest; /* of sampling */
	u32 pid_offset; /* of the pid in struct task_struct */
	u32 copy_of; /* process whose next thread to end is copied to task_copy; 0: nobody's */
	u32 wake; /* report the next fault that is counted; no other one is */
};

/* The beginning of a struct task_struct, in which the agent finds its own pid. */
struct task_copy {
	u8 bytes[8192];
};

/* Of one region; the agent multiplies by N. */
struct counts {
	u32 first_touches, write_protect_faults;
};

/* Of one CPU since the program was loaded; what the agent has not drained of `counted` is lost. */
struct totals {
	u64 sampled; /* faults that were sampled, whosever */
	u64 counted[2]; /* those of targets, by epoch */
	u64 failed; /* those of targets, for which the map had no room */
	u64 events_lost;
};

/* As struct bpf_perf_event_data of the kernel's interface to user space, x86-64. */
struct perf_fault {
	u64 registers[21];
	u64 sample_period, address;
};

enum event_kind {
	EVENT_FORK,
	EVENT_EXEC,
	EVENT_EXIT,
	EVENT_COUNTED,
};

struct event {
	u32 kind, pid;
};

BPF_ARRAY(settings, struct settings, 1);
BPF_ARRAY(task_copy, struct task_copy, 1);
BPF_PERCPU_ARRAY(totals, struct totals, 1);
BPF_HASH(targets, u32, u32, MERGEMEM_TARGETS);
BPF_TABLE("lru_percpu_hash", u64, struct counts, counts_even, MERGEMEM_REGIONS);
BPF_TABLE("lru_percpu_hash", u64, struct counts, counts_odd, MERGEMEM_REGIONS);
BPF_PROG_ARRAY(sampled, 1);
BPF_RINGBUF_OUTPUT(events, MERGEMEM_EVENT_PAGES);

/*
 * Whoever waits for the buffer is woken by the first event after it was emptied, and by no others: a
 * storm wakes the agent as often as that chooses to empty it.
 */
static inline void report(enum event_kind kind, u32 pid)
{
	struct event event = { kind, pid };
	struct totals *total;
	u32 zero = 0;

	if (!events.ringbuf_output(&event, sizeof(event), 0))
		return;
	total = totals.lookup(&zero);
	if (total)
		total->events_lost++;
}

/*
 * Count a fault that was sampled. The agent drains one map while the other is written to, so
 * nothing is ever lost between its reading of an entry and its deleting it.
 *
 * An agent that has long had nothing to do asks to be woken. It asks, then looks at `counted`; we
 * count, then look at `wake`: so one of the two sees the other. Programs on other processors may
 * report the same once more. Should one of us clear what the agent has just asked for anew, the
 * agent is woken early, and asks again or looks when it wakes up by itself.
 */
static inline void count(u64 address, bool write_protect, struct settings *set)
{
	u32 zero = 0, tgid = bpf_get_current_pid_tgid() >> 32, epoch = set->epoch;
	struct counts fresh = { !write_protect, write_protect }, *known;
	struct totals *total = totals.lookup(&zero);
	u64 key = region_key(tgid, address);

	if (!total)
		return;
	total->sampled++;
	if (!targets.lookup(&tgid))
		return;
	known = epoch ? counts_odd.lookup(&key) : counts_even.lookup(&key);
	if (known) {
		if (write_protect)
			known->write_protect_faults++;
		else
			known->first_touches++;
	} else if (epoch ? counts_odd.update(&key, &fresh) : counts_even.update(&key, &fresh)) {
		total->failed++;
		return;
	}
	total->counted[epoch & 1]++;
	asm volatile("" ::: "memory");
	if (set->wake) {
		set->wake = 0;
		report(EVENT_COUNTED, tgid);
	}
}

/* Those faults that may be sampled; a program of its own, see below. */
int on_sampled_fault(struct bpf_raw_tracepoint_args *ctx)
{
	u64 address = ctx->args[0], error_code = ctx->args[2];
	struct settings *set;
	u32 zero = 0;

	if (!fault_is_write(error_code) || !address_is_users(address))
		return 0;
	set = settings.lookup(&zero);
	if (set && page_is_sampled(address, set->salt, set->highest))
		count(address, error_code & FAULT_PRESENT, set);
	return 0;
}

/*
 * Tracepoints page_fault_user and page_fault_kernel: address, registers, error code.
 *
 * This is what every fault pays for, so it touches neither memory nor stack, and has no registers
 * to save: all the rest is behind a tail call.
 */
int on_fault(struct bpf_raw_tracepoint_args *ctx)
{
	if (page_may_be_sampled(ctx->args[0]))
		sampled.call(ctx, 0);
	return 0;
}

/*
 * The software event of page faults, where the tracepoints are missing. It samples by itself, and
 * cannot tell a write from a read nor a first touch from a write-protect fault: all are taken for
 * first touches, after which a region is looked at once it has been quiet.
 */
int on_perf_fault(struct perf_fault *ctx)
{
	struct settings *set;
	u32 zero = 0;

	set = settings.lookup(&zero);
	if (set && address_is_users(ctx->address))
		count(ctx->address, false, set);
	return 0;
}

/*
 * Tracepoint task_newtask: task, flags of clone(). In the parent, at the end of a fork, just before
 * sched_process_fork, which does not tell a new thread from a new process. Anybody's: policies may
 * choose the workers and leave out the master.
 *
 * The pid is read out of the task by an offset that the agent has found, since the tracepoint with
 * fields is a perf event, which Debian's kernels give to CAP_SYS_ADMIN alone.
 */
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0, pid;
	struct settings *set = settings.lookup(&zero);

	if (!set || !set->pid_offset || ctx->args[1] & CLONE_THREAD)
		return 0;
	if (!bpf_probe_read_kernel(&pid, sizeof(pid), (char *)ctx->args[0] + set->pid_offset))
		report(EVENT_FORK, pid);
	return 0;
}

static inline void copy_task(const void *task, u32 tgid)
{
	u32 zero = 0;
	struct settings *set = settings.lookup(&zero);
	struct task_copy *copy = task_copy.lookup(&zero);

	if (set && copy && set->copy_of == tgid)
		bpf_probe_read_kernel(copy, sizeof(*copy), task);
}

/* Anybody's: policies choose by executable. */
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	report(EVENT_EXEC, bpf_get_current_pid_tgid() >> 32);
	return 0;
}

/* Of targets only; of their threads, the first one's, with which /proc loses sight of them. */
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 id = bpf_get_current_pid_tgid();
	u32 tgid = id >> 32;

	if ((u32)id != tgid) {
		copy_task((void *)ctx->args[0], tgid);
		return 0;
	}
	if (!targets.lookup(&tgid))
		return 0;
	targets.delete(&tgid);
	report(EVENT_EXIT, tgid);
	return 0;
}
