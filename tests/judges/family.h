/* SPDX-License-Identifier: MIT */
/*
 * The processes that descend from one: found anew in each round, in /proc.
 */
#ifndef FAMILY_H
#define FAMILY_H

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>

#include "netlink.h"

#define MAX_PID (1 << 22)
#define MAX_FAMILY 4096

struct member {
	struct mergemem_process process;
	uint32_t uid;
};

static struct member members[MAX_FAMILY];
static unsigned int member_count;

/* By pid; an entry counts only if it is of this round. */
static struct {
	uint32_t parent;
	uint32_t round;
} *seen;
static uint32_t family_round;

static ssize_t read_file(const char *path, char *text, size_t bytes)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got;

	if (file < 0)
		return -1;
	got = read(file, text, bytes - 1);
	close(file);
	text[got > 0 ? got : 0] = 0;
	return got;
}

/* The parent and start time of a process that is alive. */
static bool read_stat(uint32_t pid, uint32_t *parent, uint64_t *start_time)
{
	char path[32], text[1024], state, *fields;
	unsigned long long started;

	snprintf(path, sizeof(path), "/proc/%u/stat", pid);
	if (read_file(path, text, sizeof(text)) <= 0)
		return false;
	/* The command's name may hold anything, even ") ". */
	fields = strrchr(text, ')');
	if (!fields || sscanf(fields + 1,
			      " %c %u %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d"
			      " %*d %*d %*d %llu", &state, parent, &started) != 3)
		return false;
	*start_time = started;
	return state != 'Z' && state != 'X';
}

/* The real user: whose pages may be merged with whose. */
static bool read_uid(uint32_t pid, uint32_t *uid)
{
	char path[32], text[1024], *line;

	snprintf(path, sizeof(path), "/proc/%u/status", pid);
	if (read_file(path, text, sizeof(text)) <= 0)
		return false;
	line = strstr(text, "\nUid:");
	return line && sscanf(line + 5, " %u", uid) == 1;
}

static bool descends(uint32_t pid, uint32_t ancestor)
{
	while (pid > 1 && pid < MAX_PID && seen[pid].round == family_round) {
		pid = seen[pid].parent;
		if (pid == ancestor)
			return true;
	}
	return false;
}

/* All descendants of a process but ourselves. Who vanishes meanwhile is left out. */
static void family_find(uint32_t ancestor)
{
	static struct mergemem_process found[MAX_FAMILY];
	unsigned int count = 0;
	DIR *proc = opendir("/proc");
	struct dirent *entry;

	if (!seen)
		seen = calloc(MAX_PID, sizeof(*seen));
	if (!proc || !seen)
		give_up("/proc");
	family_round++;
	while ((entry = readdir(proc)) && count < MAX_FAMILY) {
		uint32_t pid = isdigit(entry->d_name[0]) ? atoi(entry->d_name) : 0;
		uint32_t parent;
		uint64_t start_time;

		if (!pid || pid >= MAX_PID || !read_stat(pid, &parent, &start_time))
			continue;
		seen[pid].parent = parent;
		seen[pid].round = family_round;
		found[count++] = (struct mergemem_process){ .pid = pid, .start_time = start_time };
	}
	closedir(proc);
	member_count = 0;
	for (unsigned int i = 0; i < count; i++) {
		struct member *member = &members[member_count];

		member->process = found[i];
		/* Programs that change their user are not dumpable; databases do. */
		member->process.flags = MERGEMEM_PROCESS_UNDUMPABLE;
		if (found[i].pid != (uint32_t)getpid() && descends(found[i].pid, ancestor) &&
		    read_uid(found[i].pid, &member->uid))
			member_count++;
	}
}

#endif
