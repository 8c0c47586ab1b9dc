// SPDX-License-Identifier: MIT
/*
 * Sends requests that were written down before, and says what CPU time each took.
 *
 * A Python client costs more than what is measured here, the more so under emulation. So the
 * benchmark writes complete netlink messages into a file, and this program does nothing but send
 * them, one after another, and receive until each is answered:
 *
 *	replay FILE
 *
 * It says "ready" when the file is in memory, waits for a line, and answers with one line per
 * request: CPU nanoseconds (user and system, of this thread), wall nanoseconds, errno.
 */
#include <linux/netlink.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_REQUESTS 4096

static struct {
	uint64_t cpu_ns;
	uint64_t wall_ns;
	int error;
} done[MAX_REQUESTS];

static char reply[64 << 10];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static char *load(const char *path, size_t *length)
{
	FILE *file = fopen(path, "r");
	struct stat status;
	char *data;

	if (!file || fstat(fileno(file), &status))
		fail(path);
	*length = status.st_size;
	data = malloc(*length);
	if (!data || fread(data, 1, *length, file) != *length)
		fail("reading the requests");
	fclose(file);
	return data;
}

static int open_socket(void)
{
	int on = 1, buffer_bytes = 4 << 20;
	int opened = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);

	if (opened < 0)
		fail("socket");
	/* So that an acknowledgement does not carry the request back. */
	setsockopt(opened, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof(on));
	/* A request must fit in whole. */
	setsockopt(opened, SOL_SOCKET, SO_SNDBUFFORCE, &buffer_bytes, sizeof(buffer_bytes));
	return opened;
}

/* Receives until the verdict on a request; returns its errno. */
static int await(int socket)
{
	for (;;) {
		ssize_t length = recv(socket, reply, sizeof(reply), 0);
		struct nlmsghdr *message = (void *)reply;

		if (length < 0)
			fail("recv");
		for (; NLMSG_OK(message, length); message = NLMSG_NEXT(message, length))
			if (message->nlmsg_type == NLMSG_ERROR || message->nlmsg_type == NLMSG_DONE)
				return -*(int *)NLMSG_DATA(message);
	}
}

int main(int argc, char **argv)
{
	size_t length = 0, offset = 0;
	int count = 0, socket, i;
	char *requests;

	if (argc != 2) {
		fputs("usage: replay FILE\n", stderr);
		return 2;
	}
	requests = load(argv[1], &length);
	socket = open_socket();
	/* No page fault of our own shall be among what is measured. */
	memset(done, 0, sizeof(done));
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		fail("mlockall");
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		return 1;
	while (offset < length && count < MAX_REQUESTS) {
		struct nlmsghdr *message = (void *)(requests + offset);
		uint64_t cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
		uint64_t wall_ns = now_ns(CLOCK_MONOTONIC);

		if (send(socket, message, message->nlmsg_len, 0) < 0)
			fail("send");
		done[count].error = await(socket);
		done[count].wall_ns = now_ns(CLOCK_MONOTONIC) - wall_ns;
		done[count++].cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu_ns;
		offset += NLMSG_ALIGN(message->nlmsg_len);
	}
	for (i = 0; i < count; i++)
		printf("%lu %lu %d\n", done[i].cpu_ns, done[i].wall_ns, done[i].error);
	return offset < length;
}
