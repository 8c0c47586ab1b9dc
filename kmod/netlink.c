// SPDX-License-Identifier: GPL-2.0
/*
 * The generic netlink family: from messages to calls and back.
 *
 * Each command is taken apart by a parse_ function into a plain struct, which
 * refuses whatever is wrong before anything happens; then the subsystem acts on
 * the struct. The netlink core checks types and lengths by the policies here
 * and refuses attributes that a command does not know.
 *
 * parallel_ops: requests of different sockets run side by side, and none holds
 * the global generic-netlink mutex. Each does hold generic netlink's cb_lock for
 * reading, which whoever loads or unloads a family waits for, and others behind
 * him; so every request is bounded and waits for nobody for long. Unloading
 * waits for requests in flight in the same way.
 */
#include <linux/capability.h>
#include <linux/module.h>
#include <linux/netlink.h>
#include <net/genetlink.h>

#include "checksum.h"
#include "counters.h"
#include "merge.h"
#include "netlink.h"
#include "shared.h"
#include "symbols.h"
#include "target.h"
#include "unmerge.h"

struct mergemem_counted mergemem_counted;

static struct genl_family family;

#define U64_MIN(minimum) NLA_POLICY_MIN(NLA_U64, minimum)
#define ARRAY_MAX(type, count) \
	NLA_POLICY_RANGE(NLA_BINARY, sizeof(type), sizeof(type) * (count))

/*
 * A policy holds its own bounds in 16 bits with sign; these need more. Not
 * const: before 6.7 policies point to such bounds without it.
 */
static struct netlink_range_validation candidates_bytes = {
	.min = sizeof(struct mergemem_candidate),
	.max = sizeof(struct mergemem_candidate) * MERGEMEM_MAX_CANDIDATES,
};

static const struct nla_policy unmerge_policy[MERGEMEM_A_MAX + 1] = {
	[MERGEMEM_A_PROCESSES] = ARRAY_MAX(struct mergemem_process, 1),
	[MERGEMEM_A_ADDRESS] = { .type = NLA_U64 },
	[MERGEMEM_A_PAGES] = U64_MIN(1),
	[MERGEMEM_A_COUNT_ONLY] = { .type = NLA_FLAG },
};

static const struct nla_policy checksum_policy[MERGEMEM_A_MAX + 1] = {
	[MERGEMEM_A_PROCESSES] = ARRAY_MAX(struct mergemem_process, 1),
	[MERGEMEM_A_ADDRESS] = { .type = NLA_U64 },
	[MERGEMEM_A_PAGES] = U64_MIN(1),
	[MERGEMEM_A_DEPTH] = NLA_POLICY_MAX(NLA_U32, MERGEMEM_DEPTH_FULL_BYTES),
	[MERGEMEM_A_FULL_PAGES] = NLA_POLICY_RANGE(NLA_BINARY, 1,
						   MERGEMEM_MAX_FULL_PAGES / 8),
};

static const struct nla_policy merge_policy[MERGEMEM_A_MAX + 1] = {
	[MERGEMEM_A_PROCESSES] = ARRAY_MAX(struct mergemem_process,
					   MERGEMEM_MAX_PROCESSES),
	[MERGEMEM_A_CANDIDATES] = NLA_POLICY_FULL_RANGE(NLA_BINARY,
							&candidates_bytes),
	[MERGEMEM_A_FLAGS] = NLA_POLICY_MASK(NLA_U32, MERGEMEM_MERGE_FLAGS_ALL),
	[MERGEMEM_A_SPLIT_PERCENT] = NLA_POLICY_RANGE(NLA_U32, 1, 100),
};

/* Asks for the opener of the socket and for whoever sends through it. */
static int check_capability(struct sk_buff *skb, struct netlink_ext_ack *extack)
{
	if (netlink_capable(skb, CAP_SYS_PTRACE))
		return 0;
	NL_SET_ERR_MSG(extack,
		       "mergemem needs CAP_SYS_PTRACE in the initial user namespace");
	return -EPERM;
}

static int missing(struct netlink_ext_ack *extack, const char *what)
{
	/* Not a macro's literal: extack keeps the pointer, which is static. */
	extack->_msg = what;
	return -EINVAL;
}

/* ---- processes ---- */

static int parse_processes(struct nlattr *attr, struct netlink_ext_ack *extack,
			   const struct mergemem_process **processes,
			   unsigned int *count)
{
	unsigned int i;

	if (!attr)
		return missing(extack, "PROCESSES is missing");
	if (nla_len(attr) % sizeof(**processes)) {
		NL_SET_ERR_MSG_ATTR(extack, attr,
				    "PROCESSES is not an array of struct mergemem_process");
		return -EINVAL;
	}
	*processes = nla_data(attr);
	*count = nla_len(attr) / sizeof(**processes);
	for (i = 0; i < *count; i++) {
		if ((*processes)[i].flags & ~MERGEMEM_PROCESS_FLAGS_ALL) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "PROCESSES has an unknown flag");
			return -EINVAL;
		}
	}
	return 0;
}

/* ---- ranges of one process ---- */

struct page_range {
	struct mergemem_process process;
	unsigned long start;
	unsigned long end;
};

static int parse_range(struct nlattr **attrs, struct netlink_ext_ack *extack,
		       struct page_range *range)
{
	const struct mergemem_process *process;
	u64 address, pages;
	unsigned int count;
	int err = parse_processes(attrs[MERGEMEM_A_PROCESSES], extack, &process,
				  &count);

	if (err)
		return err;
	if (!attrs[MERGEMEM_A_ADDRESS])
		return missing(extack, "ADDRESS is missing");
	if (!attrs[MERGEMEM_A_PAGES])
		return missing(extack, "PAGES is missing");
	address = nla_get_u64(attrs[MERGEMEM_A_ADDRESS]);
	pages = nla_get_u64(attrs[MERGEMEM_A_PAGES]);
	if (address % PAGE_SIZE) {
		NL_SET_ERR_MSG_ATTR(extack, attrs[MERGEMEM_A_ADDRESS],
				    "ADDRESS is not a multiple of the page size");
		return -EINVAL;
	}
	if (address >= TASK_SIZE_MAX ||
	    pages > (TASK_SIZE_MAX - address) >> PAGE_SHIFT) {
		NL_SET_ERR_MSG_ATTR(extack, attrs[MERGEMEM_A_PAGES],
				    "the range leaves the user address space");
		return -EINVAL;
	}
	range->process = *process;
	range->start = address;
	range->end = address + (pages << PAGE_SHIFT);
	return 0;
}

static int get_target(struct mergemem_target *target,
		      const struct mergemem_process *process,
		      struct netlink_ext_ack *extack)
{
	const char *why = NULL;
	int err = mergemem_target_get(target, process, &why);

	if (err)
		extack->_msg = why;
	return err;
}

/* ---- replies ---- */

static void *start_reply(struct sk_buff **skb, struct genl_info *info,
			 size_t payload_bytes, u8 command)
{
	void *header;

	*skb = genlmsg_new(payload_bytes, GFP_KERNEL);
	if (!*skb)
		return NULL;
	header = genlmsg_put_reply(*skb, info, &family, 0, command);
	if (!header)
		nlmsg_free(*skb);
	return header;
}

static int finish_reply(struct sk_buff *skb, void *header,
			struct genl_info *info)
{
	genlmsg_end(skb, header);
	return genlmsg_reply(skb, info);
}

/* ---- INFO ---- */

static void collect_counters(struct mergemem_counters *counters)
{
	const atomic64_t *from = (const atomic64_t *)&mergemem_counted;
	u64 *to = (u64 *)counters;
	unsigned int i;

	for (i = 0; i < sizeof(*counters) / sizeof(*to); i++)
		to[i] = atomic64_read(&from[i]);
}

static u64 features(void)
{
	u64 features = 0;

	if (mergemem_allow_cross_uid)
		features |= MERGEMEM_FEATURE_CROSS_UID;
	if (IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE))
		features |= MERGEMEM_FEATURE_SPLIT;
	return features;
}

static int info_doit(struct sk_buff *skb, struct genl_info *info)
{
	const struct mergemem_limits limits = {
		.max_processes = MERGEMEM_MAX_PROCESSES,
		.max_candidates = MERGEMEM_MAX_CANDIDATES,
		.max_unmerge_pages = MERGEMEM_MAX_UNMERGE_PAGES,
		.max_mappings = READ_ONCE(mergemem_max_mappings),
		.max_shared_bytes = READ_ONCE(mergemem_max_shared_bytes),
	};
	struct mergemem_counters counters;
	struct mergemem_totals totals;
	struct sk_buff *reply;
	void *header;
	int err = check_capability(skb, info->extack);

	if (err)
		return err;
	collect_counters(&counters);
	mergemem_shared_totals(&totals);
	header = start_reply(&reply, info, NLMSG_DEFAULT_SIZE,
			     MERGEMEM_CMD_INFO);
	if (!header)
		return -ENOMEM;
	if (nla_put_u32(reply, MERGEMEM_A_CONTRACT_VERSION,
			MERGEMEM_CONTRACT_VERSION) ||
	    nla_put_string(reply, MERGEMEM_A_MODULE_VERSION,
			   THIS_MODULE->version) ||
	    nla_put_u64_64bit(reply, MERGEMEM_A_FEATURES, features(),
			      MERGEMEM_A_PAD) ||
	    nla_put(reply, MERGEMEM_A_LIMITS, sizeof(limits), &limits) ||
	    nla_put(reply, MERGEMEM_A_COUNTERS, sizeof(counters), &counters) ||
	    nla_put(reply, MERGEMEM_A_TOTALS, sizeof(totals), &totals)) {
		nlmsg_free(reply);
		return -EMSGSIZE;
	}
	return finish_reply(reply, header, info);
}

/* ---- CHECKSUM ---- */

/*
 * Where a dump is; lives in the callback between its parts. The bitmap lies in
 * the request, which the netlink core keeps until the dump is over.
 */
struct checksum_dump {
	struct page_range range;	/* start moves on */
	const u8 *full;
	u32 full_pages;			/* bits of it, up to the end of range */
	u16 depth_bytes;
	bool parsed;
};

static_assert(sizeof(struct checksum_dump) <=
	      sizeof_field(struct netlink_callback, ctx));

static struct checksum_dump *dump_of(struct netlink_callback *cb)
{
	return (struct checksum_dump *)cb->ctx;
}

static int parse_full_pages(struct nlattr *attr, struct netlink_ext_ack *extack,
			    struct checksum_dump *dump)
{
	const struct page_range *range = &dump->range;
	unsigned long pages = (range->end - range->start) >> PAGE_SHIFT;

	if (!attr)
		return 0;
	if (nla_len(attr) != DIV_ROUND_UP(pages, 8)) {
		NL_SET_ERR_MSG_ATTR(extack, attr,
				    "FULL_PAGES does not have one bit for each of PAGES");
		return -EINVAL;
	}
	dump->full = nla_data(attr);
	dump->full_pages = pages;
	return 0;
}

static int parse_checksum(struct nlattr **attrs, struct netlink_ext_ack *extack,
			  struct checksum_dump *dump)
{
	int err = parse_range(attrs, extack, &dump->range);

	if (err)
		return err;
	if (!attrs[MERGEMEM_A_DEPTH])
		return missing(extack, "DEPTH is missing");
	dump->depth_bytes = nla_get_u32(attrs[MERGEMEM_A_DEPTH]);
	if (dump->depth_bytes % MERGEMEM_DEPTH_STEP_BYTES) {
		NL_SET_ERR_MSG_ATTR(extack, attrs[MERGEMEM_A_DEPTH],
				    "DEPTH is not a multiple of 64 bytes");
		return -EINVAL;
	}
	err = parse_full_pages(attrs[MERGEMEM_A_FULL_PAGES], extack, dump);
	if (err)
		return err;
	dump->parsed = true;
	return 0;
}

static struct mergemem_depths depths_of(const struct checksum_dump *dump)
{
	return (struct mergemem_depths){
		.full = dump->full,
		.full_start = dump->range.end -
			      ((unsigned long)dump->full_pages << PAGE_SHIFT),
		.others_bytes = dump->depth_bytes,
	};
}

/* Room for records behind what a message needs besides; 0 when there is none. */
static unsigned long records_that_fit(const struct sk_buff *skb)
{
	const int besides = NLMSG_HDRLEN + GENL_HDRLEN +
			    nla_total_size_64bit(sizeof(u64)) + NLA_HDRLEN +
			    NLA_ALIGNTO;
	int room = min_t(int, skb_tailroom(skb) - besides,
			 U16_MAX - NLA_HDRLEN);

	return room < 0 ? 0 : room / sizeof(struct mergemem_record);
}

/* One message for one run. Returns 0, or -EMSGSIZE: leave it to the next part. */
static int put_run(struct sk_buff *skb, struct netlink_callback *cb,
		   struct mm_struct *mm, struct mergemem_run *run)
{
	const struct mergemem_depths depths = depths_of(dump_of(cb));
	struct nlattr *records;
	void *header;

	if (!run->refused)
		run->pages = min(run->pages, records_that_fit(skb));
	if (!run->pages)
		return -EMSGSIZE;
	header = genlmsg_put(skb, NETLINK_CB(cb->skb).portid,
			     cb->nlh->nlmsg_seq, &family, NLM_F_MULTI,
			     MERGEMEM_CMD_CHECKSUM);
	if (!header)
		return -EMSGSIZE;
	if (nla_put_u64_64bit(skb, MERGEMEM_A_ADDRESS, run->address,
			      MERGEMEM_A_PAD))
		goto no_room;
	if (run->refused) {
		if (nla_put_u64_64bit(skb, MERGEMEM_A_REFUSED, run->pages,
				      MERGEMEM_A_PAD))
			goto no_room;
	} else {
		records = nla_reserve_64bit(skb, MERGEMEM_A_RECORDS,
					    run->pages *
						    sizeof(struct mergemem_record),
					    MERGEMEM_A_PAD);
		if (!records)
			goto no_room;
		mergemem_checksum_fill(mm, run, &depths, nla_data(records));
	}
	genlmsg_end(skb, header);
	return 0;

no_room:
	genlmsg_cancel(skb, header);
	return -EMSGSIZE;
}

/* Finds and writes one run, under the mmap_lock. Returns 1 at the end. */
static int dump_run(struct sk_buff *skb, struct netlink_callback *cb,
		    struct mm_struct *mm, unsigned int *patience)
{
	struct page_range *range = &dump_of(cb)->range;
	struct mergemem_run run;
	int err = mergemem_mm_lock(mm, patience);

	if (err) {
		if (err == -EBUSY)
			NL_SET_ERR_MSG(cb->extack,
				       "the process keeps its mmap_lock; try again later");
		else
			NL_SET_ERR_MSG(cb->extack, "a signal came");
		return err;
	}
	if (mergemem_checksum_next_run(mm, range->start, range->end, &run)) {
		range->start = range->end;
		err = 1;
	} else {
		err = put_run(skb, cb, mm, &run);
	}
	mergemem_mm_unlock(mm);
	if (!err)
		range->start = run.address + (run.pages << PAGE_SHIFT);
	return err;
}

/*
 * The request is taken apart by the first call, not by a start operation, which
 * older kernels (6.1) give no extack: a refusal would come without a text.
 */
static int checksum_dumpit(struct sk_buff *skb, struct netlink_callback *cb)
{
	struct page_range *range = &dump_of(cb)->range;
	unsigned int patience = MERGEMEM_PATIENCE;
	struct mergemem_target target;
	/* Each time: the socket may have been handed to somebody else. */
	int err = check_capability(cb->skb, cb->extack);

	if (!err && !dump_of(cb)->parsed)
		err = parse_checksum(compat_dump_attrs(cb), cb->extack,
				     dump_of(cb));
	if (err)
		return err;
	if (range->start >= range->end)
		return 0;
	/* Nothing is held between the parts: the reader may never come back. */
	err = get_target(&target, &range->process, cb->extack);
	if (err)
		return err;
	do {
		err = dump_run(skb, cb, target.mm, &patience);
		if (signal_pending(current) && skb->len)
			break;
		cond_resched();
	} while (!err && range->start < range->end);
	mergemem_target_put(&target);

	/* What there is goes out first; an error that lasts comes again. */
	if (err < 0 && err != -EMSGSIZE && !skb->len)
		return err;
	return skb->len;
}

/* ---- MERGE ---- */

static u32 optional_u32(const struct nlattr *attr)
{
	return attr ? nla_get_u32(attr) : 0;
}

static int parse_merge(struct nlattr **attrs, struct netlink_ext_ack *extack,
		       struct mergemem_merge_call *call)
{
	struct nlattr *attr = attrs[MERGEMEM_A_CANDIDATES];
	unsigned int i;
	int err = parse_processes(attrs[MERGEMEM_A_PROCESSES], extack,
				  &call->processes, &call->process_count);

	if (err)
		return err;
	if (!attr)
		return missing(extack, "CANDIDATES is missing");
	if (nla_len(attr) % sizeof(*call->candidates)) {
		NL_SET_ERR_MSG_ATTR(extack, attr,
				    "CANDIDATES is not an array of struct mergemem_candidate");
		return -EINVAL;
	}
	call->candidates = nla_data(attr);
	call->candidate_count = nla_len(attr) / sizeof(*call->candidates);
	call->flags = optional_u32(attrs[MERGEMEM_A_FLAGS]);
	call->split_percent = optional_u32(attrs[MERGEMEM_A_SPLIT_PERCENT]);
	for (i = 0; i < call->candidate_count; i++) {
		const struct mergemem_candidate *candidate = &call->candidates[i];

		if (candidate->address % PAGE_SIZE ||
		    candidate->address >= TASK_SIZE_MAX) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "a candidate's address is not the start of a page of user memory");
			return -EINVAL;
		}
		if (candidate->process >= call->process_count) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "a candidate's process is not in PROCESSES");
			return -EINVAL;
		}
		if (candidate->group >= call->candidate_count &&
		    candidate->group != MERGEMEM_GROUP_ZERO) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "a candidate's group number is not below the number of candidates");
			return -EINVAL;
		}
	}
	return 0;
}

static int merge_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct mergemem_merge_call call;
	struct sk_buff *reply;
	struct nlattr *results;
	void *header;
	int err = check_capability(skb, info->extack);

	if (!err)
		err = parse_merge(info->attrs, info->extack, &call);
	if (err)
		return err;

	/* The reply first: once pages are merged, nothing may fail any more. */
	header = start_reply(&reply, info, nla_total_size(call.candidate_count),
			     MERGEMEM_CMD_MERGE);
	if (!header)
		return -ENOMEM;
	results = nla_reserve(reply, MERGEMEM_A_RESULTS, call.candidate_count);
	if (!results) {
		nlmsg_free(reply);
		return -EMSGSIZE;
	}
	err = mergemem_merge(&call, nla_data(results));
	if (err) {
		nlmsg_free(reply);
		return err;
	}
	return finish_reply(reply, header, info);
}

/* ---- UNMERGE ---- */

static int unmerge_doit(struct sk_buff *skb, struct genl_info *info)
{
	unsigned long unmerged, next;
	struct mergemem_target target;
	struct page_range range;
	struct sk_buff *reply;
	const char *why;
	void *header;
	int err = check_capability(skb, info->extack);

	if (!err)
		err = parse_range(info->attrs, info->extack, &range);
	if (err)
		return err;
	/* The reply first: once pages are unmerged, nothing may fail any more. */
	header = start_reply(&reply, info, NLMSG_DEFAULT_SIZE,
			     MERGEMEM_CMD_UNMERGE);
	if (!header)
		return -ENOMEM;
	err = get_target(&target, &range.process, info->extack);
	if (err)
		goto no_reply;
	err = mergemem_unmerge(target.mm, range.start, range.end,
			       info->attrs[MERGEMEM_A_COUNT_ONLY], &unmerged,
			       &next, &why);
	mergemem_target_put(&target);
	if (err) {
		info->extack->_msg = why;
		goto no_reply;
	}
	if (nla_put_u64_64bit(reply, MERGEMEM_A_UNMERGED, unmerged,
			      MERGEMEM_A_PAD) ||
	    nla_put_u64_64bit(reply, MERGEMEM_A_NEXT, next, MERGEMEM_A_PAD)) {
		err = -EMSGSIZE;
		goto no_reply;
	}
	return finish_reply(reply, header, info);

no_reply:
	nlmsg_free(reply);
	return err;
}

static const struct genl_ops operations[] = {
	{
		.cmd = MERGEMEM_CMD_INFO,
		.doit = info_doit,
	},
	{
		.cmd = MERGEMEM_CMD_CHECKSUM,
		.policy = checksum_policy,
		.maxattr = MERGEMEM_A_MAX,
		.dumpit = checksum_dumpit,
	},
	{
		.cmd = MERGEMEM_CMD_MERGE,
		.policy = merge_policy,
		.maxattr = MERGEMEM_A_MAX,
		.doit = merge_doit,
	},
	{
		.cmd = MERGEMEM_CMD_UNMERGE,
		.policy = unmerge_policy,
		.maxattr = MERGEMEM_A_MAX,
		.doit = unmerge_doit,
	},
};

static struct genl_family family __ro_after_init = {
	.name = MERGEMEM_FAMILY_NAME,
	.version = MERGEMEM_CONTRACT_VERSION,
	.module = THIS_MODULE,
	.ops = operations,
	.n_ops = ARRAY_SIZE(operations),
	.parallel_ops = true,
};

int __init mergemem_netlink_init(void)
{
	return genl_register_family(&family);
}

/* Waits until no request is being carried out. */
void mergemem_netlink_exit(void)
{
	genl_unregister_family(&family);
}
