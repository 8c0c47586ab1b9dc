/* SPDX-License-Identifier: MIT */
/*
 * A virtual machine whose memory is ours, so that it has page tables of its own over the same
 * pages: the kernel must tell KVM of each change (mmu_notifier) or the machine goes on using
 * frames that were given up.
 *
 *   machine's address	is
 *   0			struct board: its page tables, code, stack, and what both sides know
 *   MACHINE_MEMORY	the pages under test, which are all equal but for two words of 0 or 1:
 *			HOST_WORD is written by a thread of ours, MACHINE_WORD by the machine
 *
 * For each of these words the board has a note: a version from bit 2 up, bit 1 while a write is
 * under way, bit 0 the value. Whoever owns a word sees that no write of his was lost, the other
 * one, seqlock fashion, that he reads no old page; both look at the words that nobody writes, too.
 */
#include "actor.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/ioctl.h>

#define MACHINE_MEMORY	(16UL << 20)
#define MACHINE_PAGES	1024
#define HOST_WORD	10
#define MACHINE_WORD	300

struct board {
	uint64_t tables[3][PAGE_WORDS];
	unsigned char code[PAGE_BYTES];
	uint64_t stack[PAGE_WORDS];
	uint64_t reference[PAGE_WORDS];
	volatile uint64_t stop, rounds, pages;
	/* What the machine found wrong: page + 1, word, value. */
	volatile uint64_t wrong, wrong_word, wrong_value;
	volatile uint64_t host_note[MACHINE_PAGES], machine_note[MACHINE_PAGES];
};

static struct {
	struct board *board;
	struct kvm_run *run;
	uint64_t *start;
	uint64_t writes;
	int cpu;
	pthread_t runner, writer;
	bool ended;
	char wrong[200];
} machine;

/* Macros: the machine's code may call nothing, and the compiler inlines nothing into it. */
#define note_begun(note)	(((note) + 4) | 2)
#define note_done(note, value)	((((note) + 8) & ~3UL) | (value))

extern const unsigned char __start_machine_code[], __stop_machine_code[];

/*
 * What the machine does. Copied to the board: it may use nothing but its argument, nor registers
 * that would have to be enabled first.
 */
__attribute__((section("machine_code"), noinline, target("general-regs-only"), used))
static void machine_main(struct board *board)
{
	uint64_t state = 88172645463325252;

	while (!board->stop && !board->wrong) {
		for (uint64_t page = 0; page < board->pages; page++) {
			volatile uint64_t *words = (void *)(MACHINE_MEMORY + page * PAGE_BYTES);
			uint64_t note = board->host_note[page], host = words[HOST_WORD];
			bool quiet = note == board->host_note[page] && !(note & 2);
			uint64_t own = board->machine_note[page], bad = PAGE_WORDS;
			uint64_t some, value;

			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			some = state >> 32 & (PAGE_WORDS - 1);
			if (quiet && host != (note & 1))
				bad = HOST_WORD;
			else if (words[MACHINE_WORD] != (own & 1))
				bad = MACHINE_WORD;
			else if (some != HOST_WORD && some != MACHINE_WORD &&
				 words[some] != board->reference[some])
				bad = some;
			if (bad < PAGE_WORDS) {
				board->wrong_word = bad;
				board->wrong_value = words[bad];
				board->wrong = page + 1;
				break;
			}
			/* Seldom, or no page stays as it is until it is merged. */
			if (state & 63)
				continue;
			value = !(state >> 8 & 3);
			board->machine_note[page] = note_begun(own);
			words[MACHINE_WORD] = value;
			board->machine_note[page] = note_done(own, value);
		}
		board->rounds++;
	}
	for (;;)
		asm volatile("hlt");
}

static void *run_machine(void *unused)
{
	int result;

	do {
		result = ioctl(machine.cpu, KVM_RUN, 0);
	} while (result && errno == EINTR);
	if (result || machine.run->exit_reason != KVM_EXIT_HLT)
		snprintf(machine.wrong, sizeof(machine.wrong), "the machine ended: errno %d exit %u",
			 result ? errno : 0, machine.run->exit_reason);
	__atomic_store_n(&machine.ended, true, __ATOMIC_SEQ_CST);
	return unused;
}

static const char *write_and_look(struct board *board, uint64_t random)
{
	uint64_t page = random % board->pages, some = random >> 16 & (PAGE_WORDS - 1);
	volatile uint64_t *words = machine.start + page * PAGE_WORDS;
	uint64_t note = board->machine_note[page], is = words[MACHINE_WORD];
	uint64_t own = board->host_note[page], value = !(random >> 40 & 3);

	if (note == board->machine_note[page] && !(note & 2) && is != (note & 1))
		return "a write of the machine is not seen";
	if (words[HOST_WORD] != (own & 1))
		return "a write of the host is lost";
	if (some != HOST_WORD && some != MACHINE_WORD && words[some] != board->reference[some])
		return "a word that nobody writes has changed";
	if (random >> 32 & 15)
		return NULL;
	board->host_note[page] = note_begun(own);
	words[HOST_WORD] = value;
	board->host_note[page] = note_done(own, value);
	machine.writes++;
	return NULL;
}

static void *write_beside_machine(void *unused)
{
	uint64_t state = 362436069;

	while (!__atomic_load_n(&machine.ended, __ATOMIC_SEQ_CST)) {
		const char *wrong = write_and_look(machine.board, next_random(&state));

		if (wrong) {
			snprintf(machine.wrong, sizeof(machine.wrong), "%s", wrong);
			machine.board->stop = true;
			break;
		}
		/* Two processors have a machine, this, and a merge to run. */
		usleep(20);
	}
	return unused;
}

/* All that the host's processor can: KVM allows 64-bit mode to those only that have it. */
static int set_features(int kvm)
{
	enum { ENTRIES = 256 };
	struct kvm_cpuid2 *features = calloc(1, sizeof(*features) +
					     ENTRIES * sizeof(features->entries[0]));
	int error = -1;

	if (!features)
		return -1;
	features->nent = ENTRIES;
	if (!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, features))
		error = ioctl(machine.cpu, KVM_SET_CPUID2, features);
	free(features);
	return error;
}

/* 64-bit mode, with the first GiB mapped as it is. */
static int set_registers(struct board *board)
{
	struct kvm_segment code = { .type = 11, .present = 1, .s = 1, .l = 1, .g = 1, .limit = ~0U };
	struct kvm_segment data = { .type = 3, .present = 1, .s = 1, .db = 1, .g = 1, .limit = ~0U };
	struct kvm_regs registers = { .rflags = 2 };
	struct kvm_sregs special;

	board->tables[0][0] = offsetof(struct board, tables[1]) | 3;
	board->tables[1][0] = offsetof(struct board, tables[2]) | 3;
	for (uint64_t n = 0; n < PAGE_WORDS; n++)
		board->tables[2][n] = n << 21 | 0x83;
	if (ioctl(machine.cpu, KVM_GET_SREGS, &special))
		return -1;
	special.cr0 = 0x80000011;
	special.cr3 = offsetof(struct board, tables[0]);
	special.cr4 = 0x20;
	special.efer = 0x500;
	special.cs = code;
	special.ds = special.es = special.fs = special.gs = special.ss = data;
	registers.rip = offsetof(struct board, code) + (uintptr_t)machine_main -
			(uintptr_t)__start_machine_code;
	/* As after a call. */
	registers.rsp = offsetof(struct board, reference) - 8;
	registers.rdi = 0;
	return ioctl(machine.cpu, KVM_SET_SREGS, &special) ||
	       ioctl(machine.cpu, KVM_SET_REGS, &registers);
}

static int build_machine(size_t length)
{
	struct kvm_userspace_memory_region board = {
		.slot = 0,
		.memory_size = (sizeof(struct board) + PAGE_BYTES - 1) & -PAGE_BYTES,
		.userspace_addr = (uintptr_t)machine.board,
	}, memory = {
		.slot = 1,
		.guest_phys_addr = MACHINE_MEMORY,
		.memory_size = length,
		.userspace_addr = (uintptr_t)machine.start,
	};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm;

	if (kvm < 0)
		return -1;
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0 || ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) ||
	    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &board) ||
	    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &memory))
		return -1;
	machine.cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (machine.cpu < 0)
		return -1;
	machine.run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
			   MAP_SHARED, machine.cpu, 0);
	if (machine.run == MAP_FAILED || set_features(kvm))
		return -1;
	return set_registers(machine.board);
}

/* machine ADDRESS PAGES: pages that are all equal; runs until stop_machine */
static void do_machine(const struct command *command)
{
	uint64_t pages = number(command, 2);
	struct board *board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (board == MAP_FAILED)
		return failed("mmap");
	machine.board = board;
	machine.start = pointer(command, 1);
	board->pages = pages;
	memcpy(board->code, __start_machine_code, __stop_machine_code - __start_machine_code);
	memcpy(board->reference, machine.start, PAGE_BYTES);
	for (uint64_t page = 0; page < pages; page++) {
		machine.start[page * PAGE_WORDS + HOST_WORD] = 0;
		machine.start[page * PAGE_WORDS + MACHINE_WORD] = 0;
	}
	if (build_machine(pages * PAGE_BYTES))
		return failed("kvm");
	errno = pthread_create(&machine.runner, NULL, run_machine, NULL);
	if (!errno)
		errno = pthread_create(&machine.writer, NULL, write_beside_machine, NULL);
	done_or_failed(-errno, "pthread_create");
}

/* machine_so_far: answers as stop_machine does, but for what the machine itself says */
static void do_machine_so_far(const struct command *command)
{
	(void)command;
	answer("ok %lu %lu %s", machine.board->rounds,
	       __atomic_load_n(&machine.writes, __ATOMIC_RELAXED), machine.wrong);
}

/* stop_machine: answers its rounds, the host's writes, then what was wrong, if anything was */
static void do_stop_machine(const struct command *command)
{
	struct board *board = machine.board;

	(void)command;
	board->stop = true;
	pthread_join(machine.runner, NULL);
	pthread_join(machine.writer, NULL);
	if (board->wrong && !machine.wrong[0])
		snprintf(machine.wrong, sizeof(machine.wrong), "the machine: page %lu word %lu is %#lx",
			 board->wrong - 1, board->wrong_word, board->wrong_value);
	answer("ok %lu %lu %s", board->rounds, machine.writes, machine.wrong);
}
