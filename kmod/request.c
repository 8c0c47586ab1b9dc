// SPDX-License-Identifier: GPL-2.0
/*
 * Setting up a MERGE request: processes looked up, users compared, candidates
 * sorted by process and address.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "merge.h"
#include "request.h"
#include "target.h"

bool mergemem_allow_cross_uid;

static int by_process_and_address(const void *a, const void *b)
{
	const struct merge_page *page_a = a, *page_b = b;

	if (page_a->process != page_b->process)
		return page_a->process < page_b->process ? -1 : 1;
	if (page_a->address != page_b->address)
		return page_a->address < page_b->address ? -1 : 1;
	/* Keeps the order of the request for an address that is named twice. */
	return page_a->index < page_b->index ? -1 : 1;
}

/* Finds each group's first candidate, its user, and the pages to refuse. */
static void admit(struct merge_request *request, const int *errors)
{
	unsigned int count = request->call->candidate_count;
	unsigned int i;

	for (i = 0; i <= count; i++) {
		request->groups[i].first = U32_MAX;
		request->groups[i].node = NUMA_NO_NODE;
	}
	request->groups[count].is_zero = true;
	for (i = 0; i < count; i++) {
		struct merge_page *page = &request->pages[i];
		struct mergemem_target *target = &request->targets[page->process];
		struct merge_group *group = group_of(request, page);
		u8 *result = result_of(request, page);

		if (group->first == U32_MAX)
			group->first = i;
		if (errors[page->process] == -EACCES) {
			*result = MERGEMEM_REFUSED;
		} else if (errors[page->process] == -EBUSY) {
			*result = MERGEMEM_BUSY;
		} else if (errors[page->process]) {
			*result = group->first == i ? MERGEMEM_NOTASK1 :
						      MERGEMEM_NOTASK2;
		} else if (group->is_zero) {
			continue;	/* nobody's content: no domain */
		} else if (!group->has_uid) {
			group->uid = target->uid;
			group->has_uid = true;
		} else if (!uid_eq(group->uid, target->uid) &&
			   !mergemem_allow_cross_uid) {
			*result = MERGEMEM_DOMAIN;
		}
	}
}

/* A client that asks in this order saves the sorting, a good part of a merge. */
static void sort_pages(struct merge_page *pages, unsigned int count)
{
	unsigned int i;

	for (i = 1; i < count; i++)
		if (by_process_and_address(&pages[i - 1], &pages[i]) > 0)
			break;
	if (i < count)
		sort(pages, count, sizeof(*pages), by_process_and_address, NULL);
}

/**
 * mergemem_request_init - look up all that a request names, and sort it
 * @request: filled in; to be ended with mergemem_request_exit(), whatever comes
 * @call: the request as the client sent it
 * @results: receives the results of pages whose process is refused, and UNDECIDED
 *	for all others
 *
 * Return: 0 or -ENOMEM
 */
int mergemem_request_init(struct merge_request *request,
			  const struct mergemem_merge_call *call, u8 *results)
{
	/* How much is wanted is up to the client, who is told if it fails. */
	const gfp_t gfp = GFP_KERNEL | __GFP_NOWARN;
	unsigned int count = call->candidate_count;
	int *errors;
	unsigned int i;

	*request = (struct merge_request){
		.call = call,
		.results = results,
		.patience = MERGEMEM_PATIENCE,
	};
	memset(results, UNDECIDED, count);
	request->targets = kvcalloc(call->process_count,
				    sizeof(*request->targets), gfp);
	request->pages = kvcalloc(count, sizeof(*request->pages), gfp);
	request->groups = kvcalloc(count + 1, sizeof(*request->groups), gfp);
	request->batch = kvzalloc(sizeof(*request->batch), gfp);
	errors = kvcalloc(call->process_count, sizeof(*errors), gfp);
	if (!request->targets || !request->pages || !request->groups ||
	    !request->batch || !errors) {
		kvfree(errors);
		return -ENOMEM;
	}
	for (i = 0; i < count; i++)
		request->pages[i] = (struct merge_page){
			.address = call->candidates[i].address,
			.process = call->candidates[i].process,
			.group = min(call->candidates[i].group, count),
			.index = i,
		};
	for (i = 0; i < call->process_count; i++) {
		const char *why;

		errors[i] = mergemem_target_get(&request->targets[i],
						&call->processes[i], &why);
	}
	admit(request, errors);
	kvfree(errors);
	sort_pages(request->pages, count);
	return 0;
}

/* Drops every reference that the request still has. */
void mergemem_request_exit(struct merge_request *request)
{
	unsigned int i;

	if (request->groups)
		for (i = 0; i <= request->call->candidate_count; i++)
			if (request->groups[i].target)
				put_page(request->groups[i].target);
	if (request->targets)
		for (i = 0; i < request->call->process_count; i++)
			mergemem_target_put(&request->targets[i]);
	kvfree(request->batch);
	kvfree(request->groups);
	kvfree(request->pages);
	kvfree(request->targets);
}
