/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What a page fault means, by the error code that x86 processors push (Intel's manual, volume 3,
 * "page-fault exceptions").
 */
#ifndef MERGEMEM_FAULT_H
#define MERGEMEM_FAULT_H

#define FAULT_PRESENT	(1 << 0)
#define FAULT_WRITE	(1 << 1)
#define FAULT_USER	(1 << 2)

/*
 * The write of a program, or of the kernel on its behalf: copy_to_user() of what read() has read is
 * how weights and caches come into memory. So the bit that tells the two apart is left out.
 * Any other bit, set, means something else: instruction fetch, protection key, shadow stack,
 * reserved bits, an enclave.
 */
#define FIRST_TOUCH	FAULT_WRITE
#define WRITE_PROTECT	(FAULT_WRITE | FAULT_PRESENT)

static inline bool fault_is_write(u64 error_code)
{
	return (error_code & ~(u64)(FAULT_USER | FAULT_PRESENT)) == FAULT_WRITE;
}

/* The kernel's half of the address space begins at the top bit. */
static inline bool address_is_users(u64 address)
{
	return (s64)address >= 0;
}

#endif
