/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_NETLINK_H
#define MERGEMEM_NETLINK_H

int mergemem_netlink_init(void);
void mergemem_netlink_exit(void);

#endif /* MERGEMEM_NETLINK_H */
