// SPDX-License-Identifier: MIT
/*
 * A storm of page faults, and how long it takes: the load that hints may slow down.
 *
 *   hints_storm touch|cow PAGES ROUNDS
 *
 * touch: first writes to new memory. cow: writes to memory that a child shares. For each round, a
 * line with the nanoseconds of CPU time that the writes took, and nothing but the writes.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096UL

static unsigned long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static unsigned long long write_all(volatile char *area, size_t pages)
{
	unsigned long long start = now_ns();

	for (size_t page = 0; page < pages; page++)
		area[page * PAGE_BYTES] = 1;
	return now_ns() - start;
}

int main(int count, char **word)
{
	size_t pages = count > 2 ? strtoul(word[2], NULL, 10) : 0;
	int cow = count > 1 && !strcmp(word[1], "cow");

	if (count != 4 || !pages)
		return 2;
	/* The driver says when; by then it has made us a target. */
	printf("ready\n");
	fflush(stdout);
	for (char line[16]; fgets(line, sizeof(line), stdin);) {
		for (int round = atoi(word[3]); round > 0; round--) {
			char *area = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
					  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			pid_t child = 0;

			if (area == MAP_FAILED || madvise(area, pages * PAGE_BYTES, MADV_NOHUGEPAGE))
				return 3;
			if (cow) {
				write_all(area, pages);
				child = fork();
				if (!child)
					for (;;)
						pause();
			}
			printf("%llu ", write_all(area, pages));
			if (child) {
				kill(child, SIGKILL);
				waitpid(child, NULL, 0);
			}
			munmap(area, pages * PAGE_BYTES);
		}
		printf("\n");
		fflush(stdout);
	}
	return 0;
}
