// SPDX-License-Identifier: MIT
/*
 * A process whose memory a test controls to the byte.
 *
 * Starting a Python costs seconds in an emulated guest, and nobody can say what is in its memory.
 * So tests start this one, and tell it over a socket what to map, fill, write, fork and so on:
 *
 *	actor NAME
 *
 * It connects to the abstract unix socket NAME, says "hello PID", and then answers each line with
 * one line. The child of a fork, and what exec leaves, connect anew, so that every process has a
 * channel of its own. Addresses are decimal or 0x...; sizes are in pages.
 *
 *	actor.c		the channel, and the table of commands
 *	actor_memory.h	mapping, filling, checking, changing memory
 *	actor_io.h	I/O that keeps pages in use for as long as a test wants
 *	actor_writers.h	threads that write and read at random
 *	actor_churn.h	threads that change mappings, and one that hogs mmap_lock
 *	actor_storm.h	threads that do all of that and more, to pages that may be huge or on swap
 *	actor_events.h	locks, userfaultfd, memory policies
 *	actor_kvm.h	a virtual machine in the same memory
 */
#include "actor.h"

#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "actor_churn.h"
#include "actor_events.h"
#include "actor_io.h"
#include "actor_kvm.h"
#include "actor_memory.h"
#include "actor_storm.h"
#include "actor_writers.h"

static const char *channel_name;
static int channel = -1;

static void send_line(const char *line, size_t length)
{
	while (length) {
		ssize_t sent = send(channel, line, length, MSG_NOSIGNAL);

		/* The test has gone; so do we. */
		if (sent < 0)
			_exit(0);
		line += sent;
		length -= sent;
	}
}

static void answer(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	line[length] = '\n';
	send_line(line, length + 1);
}

static void open_channel(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	size_t length = strlen(channel_name);

	if (channel >= 0)
		close(channel);
	channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	/* The leading zero byte makes the name abstract. */
	memcpy(address.sun_path + 1, channel_name, length);
	if (connect(channel, (void *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + length))
		_exit(3);
	answer("hello %d", getpid());
}

/* fork: the child connects by itself. */
static void do_fork(const struct command *command)
{
	pid_t child = fork();

	(void)command;
	if (child)
		done_or_failed(child, "fork");
	else
		open_channel();
}

/*
 * spawn COUNT EVERY MILLISECONDS: so many children that end at once, but for one of EVERY, which
 * lives that long before it does
 */
static void do_spawn(const struct command *command)
{
	for (uint64_t child = 0; child < number(command, 1); child++) {
		pid_t pid = fork();

		if (pid < 0)
			return failed("fork");
		if (pid)
			continue;
		if (child % number(command, 2) == 0)
			usleep(number(command, 3) * 1000);
		_exit(0);
	}
	done();
}

/* exec: this program again, which connects by itself; the memory of before is gone. */
static void do_exec(const struct command *command)
{
	(void)command;
	execl("/proc/self/exe", "actor", channel_name, NULL);
	failed("exec");
}

/* exit STATUS */
static void do_exit(const struct command *command)
{
	_exit(number(command, 1));
}

/* crash: die with a core dump */
static void do_crash(const struct command *command)
{
	struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };

	(void)command;
	setrlimit(RLIMIT_CORE, &limit);
	abort();
}

/* dumpable 0|1 */
static void do_dumpable(const struct command *command)
{
	done_or_failed(prctl(PR_SET_DUMPABLE, number(command, 1)), "prctl");
}

/* setuid UID */
static void do_setuid(const struct command *command)
{
	done_or_failed(setresuid(number(command, 1), number(command, 1), number(command, 1)),
		       "setresuid");
}

static const struct {
	const char *verb;
	void (*function)(const struct command *command);
} commands[] = {
	{ "fork", do_fork },
	{ "spawn", do_spawn },
	{ "exec", do_exec },
	{ "exit", do_exit },
	{ "crash", do_crash },
	{ "dumpable", do_dumpable },
	{ "setuid", do_setuid },
	/* actor_memory.h */
	{ "map", do_map },
	{ "fill", do_fill },
	{ "verify", do_verify },
	{ "zeros", do_zeros },
	{ "touch", do_touch },
	{ "read", do_read },
	{ "write", do_write },
	{ "flip", do_flip },
	{ "clear", do_clear },
	{ "munmap", do_munmap },
	{ "mremap", do_mremap },
	{ "mprotect", do_mprotect },
	{ "madvise", do_madvise },
	{ "mlock", do_mlock },
	{ "munlock", do_munlock },
	{ "userfault", do_userfault },
	/* actor_io.h */
	{ "vmsplice", do_vmsplice },
	{ "drain", do_drain },
	{ "register", do_register },
	{ "unregister", do_unregister },
	{ "zerocopy", do_zerocopy },
	{ "receive", do_receive },
	{ "direct", do_direct },
	{ "wait", do_wait },
	/* actor_writers.h */
	{ "writers", do_writers },
	{ "writers_so_far", do_writers_so_far },
	{ "stop_writers", do_stop_writers },
	/* actor_churn.h */
	{ "churn", do_churn },
	{ "churn_so_far", do_churn_so_far },
	{ "stop_churn", do_stop_churn },
	{ "hog", do_hog },
	{ "stop_hog", do_stop_hog },
	/* actor_storm.h */
	{ "storm", do_storm },
	{ "storm_so_far", do_storm_so_far },
	{ "stop_storm", do_stop_storm },
	/* actor_events.h */
	EVENT_COMMANDS,
	/* actor_kvm.h */
	{ "machine", do_machine },
	{ "machine_so_far", do_machine_so_far },
	{ "stop_machine", do_stop_machine },
};

static void obey(char *line)
{
	struct command command = { 0 };
	char *rest = line, *word;

	while ((word = strsep(&rest, " ")) && command.count < 16)
		command.word[command.count++] = word;
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
		if (!strcmp(commands[i].verb, command.word[0]))
			return commands[i].function(&command);
	answer("error %d no command %s", ENOSYS, command.word[0]);
}

int main(int count, char **words)
{
	static char line[4096];
	size_t length = 0;

	if (count != 2)
		return 2;
	channel_name = words[1];
	/* Children need nobody to wait for them. */
	signal(SIGCHLD, SIG_IGN);
	open_channel();
	for (;;) {
		ssize_t got = recv(channel, line + length, sizeof(line) - length, 0);
		char *end;

		if (got <= 0)
			return 0;
		length += got;
		/* The test waits for each answer, so no two lines are ever under way. */
		end = memchr(line, '\n', length);
		if (end) {
			*end = 0;
			length = 0;
			obey(line);
		}
	}
}
