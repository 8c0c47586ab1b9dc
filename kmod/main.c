// SPDX-License-Identifier: GPL-2.0
/*
 * mergemem: merges equal anonymous pages of running processes.
 *
 * The parts, in the order in which they come up:
 *
 *   symbols.c   the kernel's unexported functions
 *   checksum.c  CHECKSUM: what user space gets to know of a page
 *   shared.c    shared pages, and how many there are
 *   netlink.c   the contract (uapi/mergemem.h), and calls to
 *     target.c    processes and page tables
 *     request.c   MERGE: what a request names
 *     merge.c     MERGE: groups, passes
 *     huge.c      MERGE: splitting huge pages
 *     attach.c    MERGE: the page-table change
 *     unmerge.c   UNMERGE
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>

#include "checksum.h"
#include "merge.h"
#include "netlink.h"
#include "shared.h"
#include "symbols.h"

module_param_named(allow_cross_uid, mergemem_allow_cross_uid, bool, 0444);
MODULE_PARM_DESC(allow_cross_uid,
		 "let processes of different real users share pages (default: no)");
module_param_named(max_mappings, mergemem_max_mappings, uint, 0644);
MODULE_PARM_DESC(max_mappings,
		 "mappings that one shared page may have (default: 4096)");
module_param_named(max_shared_bytes, mergemem_max_shared_bytes, ulong, 0644);
MODULE_PARM_DESC(max_shared_bytes,
		 "bytes of shared pages, which cannot be swapped; 0: no limit (default: half of the memory)");

static int __init mergemem_init(void)
{
	int err = mergemem_symbols_resolve();

	if (err)
		return err;
	mergemem_checksum_init();
	err = mergemem_shared_init();
	if (err)
		return err;
	err = mergemem_netlink_init();
	if (err)
		goto err_netlink;
	pr_info("contract version %d\n", MERGEMEM_CONTRACT_VERSION);
	return 0;

err_netlink:
	mergemem_shared_exit();
	return err;
}

static void __exit mergemem_exit(void)
{
	mergemem_netlink_exit();
	mergemem_shared_exit();
}

module_init(mergemem_init);
module_exit(mergemem_exit);

MODULE_DESCRIPTION("Merge equal anonymous pages of running processes");
MODULE_VERSION("0.3.0");
MODULE_LICENSE("GPL");
