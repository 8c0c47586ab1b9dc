/* SPDX-License-Identifier: MIT */
/*
 * Processes of a program, found in /proc as an agent does, and their private memory.
 */
#ifndef VICTIMS_H
#define VICTIMS_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "netlink.h"

#define MAX_VICTIMS 64
#define MAX_RANGES 1024
/* Smaller mappings hold nothing that is worth a request. */
#define MIN_RANGE_PAGES 16

struct range {
	unsigned int victim;
	uint64_t address;
	uint64_t pages;
};

struct victims {
	unsigned int count, range_count;
	struct mergemem_process process[MAX_VICTIMS];
	struct range range[MAX_RANGES];
};

/* Field 22 of /proc/PID/stat; 0 when there is no such process. */
static uint64_t start_time_of(unsigned int pid)
{
	char path[64], line[1024] = "", *at;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%u/stat", pid);
	file = fopen(path, "re");
	if (!file)
		return 0;
	if (!fgets(line, sizeof(line), file))
		line[0] = 0;
	fclose(file);
	/* Behind the name, which may hold anything, comes field 3. */
	at = strrchr(line, ')');
	for (int field = 2; at && field < 22; field++)
		at = strchr(at + 1, ' ');
	return at ? strtoull(at, NULL, 10) : 0;
}

static bool runs_program(unsigned int pid, const char *program)
{
	char path[64], target[512];
	ssize_t length;

	snprintf(path, sizeof(path), "/proc/%u/exe", pid);
	length = readlink(path, target, sizeof(target) - 1);
	if (length < 0)
		return false;
	target[length] = 0;
	return !strcmp(target, program);
}

/* Adds the private mappings of no file that can be read at the moment. */
static void find_ranges(struct victims *victims, unsigned int victim)
{
	char path[64], line[512];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%u/maps", victims->process[victim].pid);
	file = fopen(path, "re");
	while (file && victims->range_count < MAX_RANGES && fgets(line, sizeof(line), file)) {
		struct range *range = &victims->range[victims->range_count];
		unsigned long start, end, inode;
		char rights[8];

		if (sscanf(line, "%lx-%lx %7s %*x %*s %lu", &start, &end, rights, &inode) != 4 ||
		    inode || rights[0] != 'r' || rights[3] != 'p' ||
		    end - start < MIN_RANGE_PAGES * PAGE_BYTES)
			continue;
		*range = (struct range){ victim, start, (end - start) / PAGE_BYTES };
		victims->range_count++;
	}
	if (file)
		fclose(file);
}

/* All processes of that program, as of now. */
static void find_victims(struct victims *victims, const char *program)
{
	DIR *directory = opendir("/proc");
	struct dirent *entry;

	victims->count = victims->range_count = 0;
	while (directory && victims->count < MAX_VICTIMS && (entry = readdir(directory))) {
		unsigned int pid = strtoul(entry->d_name, NULL, 10);

		if (!pid || !runs_program(pid, program))
			continue;
		victims->process[victims->count] = (struct mergemem_process){
			.pid = pid, .start_time = start_time_of(pid),
		};
		find_ranges(victims, victims->count++);
	}
	if (directory)
		closedir(directory);
}

#endif
