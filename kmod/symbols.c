// SPDX-License-Identifier: GPL-2.0
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kallsyms.h>
#include <linux/kprobes.h>

#include "symbols.h"

/*
 * NULL until resolved: a static call to NULL does nothing and returns garbage,
 * which would be fatal here, but mergemem_symbols_resolve() runs first of all
 * and covers the same list.
 */
#define MERGEMEM_DEFINE_SYMBOL(name) \
	DEFINE_STATIC_CALL_NULL(mergemem_##name, name);
MERGEMEM_SYMBOLS(MERGEMEM_DEFINE_SYMBOL)

DEFINE_STATIC_CALL_NULL(mergemem_kallsyms_lookup_name, kallsyms_lookup_name);

/*
 * A kprobe is the one exported way to the address of a function by name. With
 * IBT it points behind the ENDBR, which a direct call does not need.
 *
 * It is never armed: disarming allocates, and where that fails the kernel keeps
 * the probe, without a word to us, in a stack frame that is gone.
 */
static int find_lookup(void)
{
	struct kprobe probe = {
		.symbol_name = "kallsyms_lookup_name",
		.flags = KPROBE_FLAG_DISABLED,
	};
	int err = register_kprobe(&probe);

	if (err)
		return err;
	static_call_update(mergemem_kallsyms_lookup_name,
			   (typeof(&kallsyms_lookup_name))probe.addr);
	unregister_kprobe(&probe);
	return 0;
}

int mergemem_symbols_resolve(void)
{
	char missing[256] = "";
	unsigned long address;
	int err = find_lookup();

	if (err) {
		pr_err("cannot load: this kernel gives no kprobe on kallsyms_lookup_name (error %d); it needs CONFIG_KPROBES and CONFIG_KALLSYMS\n",
		       err);
		return err;
	}

#define MERGEMEM_RESOLVE_SYMBOL(name)						\
	address = static_call(mergemem_kallsyms_lookup_name)(#name);		\
	if (address) {								\
		static_call_update(mergemem_##name,				\
				   (typeof(&name))address);			\
	} else {								\
		strlcat(missing, " " #name, sizeof(missing));			\
	}
	MERGEMEM_SYMBOLS(MERGEMEM_RESOLVE_SYMBOL)

	if (*missing) {
		pr_err("cannot load: this kernel lacks%s\n", missing);
		return -ENOENT;
	}
	return 0;
}
