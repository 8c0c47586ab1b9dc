/* SPDX-License-Identifier: MIT */
/*
 * Talking to the module: the least of netlink that the merger needs, one request at a time.
 */
#ifndef NETLINK_H
#define NETLINK_H

#include <errno.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../kmod/uapi/mergemem.h"

#define REQUEST_BYTES (1 << 18)
#define REPLY_BYTES (1 << 18)

/* Called for each message of a reply, with its attributes. */
typedef void reply_function(const struct nlattr *attributes, size_t bytes);

static struct {
	int socket;
	uint32_t sequence;
	uint16_t family;
	size_t used;
	char request[REQUEST_BYTES] __attribute__((aligned(8)));
	char reply[REPLY_BYTES] __attribute__((aligned(8)));
	/* What the kernel said of the last refusal. */
	char text[256];
} channel = { .family = GENL_ID_CTRL };

static void give_up(const char *what)
{
	fprintf(stderr, "merger: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* A new request; returns nothing, the attributes are put behind it one by one. */
static void request_begin(uint8_t command, uint16_t flags)
{
	struct nlmsghdr *header = (void *)channel.request;
	struct genlmsghdr *generic = NLMSG_DATA(header);

	memset(channel.request, 0, NLMSG_HDRLEN + GENL_HDRLEN);
	header->nlmsg_type = channel.family;
	header->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags;
	header->nlmsg_seq = ++channel.sequence;
	generic->cmd = command;
	generic->version = 1;
	channel.used = NLMSG_HDRLEN + GENL_HDRLEN;
}

static void put(uint16_t type, const void *payload, size_t bytes)
{
	struct nlattr *attribute = (void *)(channel.request + channel.used);
	size_t whole = NLA_HDRLEN + NLA_ALIGN(bytes);

	if (channel.used + whole > REQUEST_BYTES) {
		errno = EMSGSIZE;
		give_up("request");
	}
	memset(attribute, 0, whole);
	attribute->nla_type = type;
	attribute->nla_len = NLA_HDRLEN + bytes;
	if (bytes)
		memcpy((char *)attribute + NLA_HDRLEN, payload, bytes);
	channel.used += whole;
}

static void put_u32(uint16_t type, uint32_t value)
{
	put(type, &value, sizeof(value));
}

static void put_u64(uint16_t type, uint64_t value)
{
	put(type, &value, sizeof(value));
}

/* An attribute's payload and its length; NULL if there is none of that type. */
static const void *find(const struct nlattr *attribute, size_t bytes, uint16_t type, size_t *length)
{
	while (bytes >= NLA_HDRLEN && attribute->nla_len >= NLA_HDRLEN &&
	       attribute->nla_len <= bytes) {
		size_t whole = NLA_ALIGN(attribute->nla_len);

		if ((attribute->nla_type & NLA_TYPE_MASK) == type) {
			*length = attribute->nla_len - NLA_HDRLEN;
			return (const char *)attribute + NLA_HDRLEN;
		}
		if (whole > bytes)
			break;
		bytes -= whole;
		attribute = (const void *)((const char *)attribute + whole);
	}
	*length = 0;
	return NULL;
}

static void keep_text(const struct nlmsghdr *header)
{
	const char *start = NLMSG_DATA(header), *text;
	size_t skip = sizeof(int), bytes = header->nlmsg_len - NLMSG_HDRLEN, length;

	channel.text[0] = 0;
	if (header->nlmsg_type == NLMSG_ERROR)
		skip = sizeof(struct nlmsgerr);
	if (!(header->nlmsg_flags & NLM_F_ACK_TLVS) || bytes < skip)
		return;
	text = find((const void *)(start + skip), bytes - skip, NLMSGERR_ATTR_MSG, &length);
	if (text)
		snprintf(channel.text, sizeof(channel.text), "%.*s", (int)length, text);
}

/* Send the request and read its reply to the end: 0, or the negative errno of the kernel. */
static int request_send(reply_function *reply)
{
	struct nlmsghdr *header = (void *)channel.request;

	header->nlmsg_len = channel.used;
	if (send(channel.socket, channel.request, channel.used, 0) < 0)
		give_up("send");
	for (;;) {
		ssize_t got = recv(channel.socket, channel.reply, REPLY_BYTES, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			give_up("recv");
		for (header = (void *)channel.reply; NLMSG_OK(header, got);
		     header = NLMSG_NEXT(header, got)) {
			if (header->nlmsg_seq != channel.sequence)
				continue;
			if (header->nlmsg_type == NLMSG_ERROR || header->nlmsg_type == NLMSG_DONE) {
				keep_text(header);
				return *(int *)NLMSG_DATA(header);
			}
			if (reply)
				reply((void *)((char *)NLMSG_DATA(header) + GENL_HDRLEN),
				      header->nlmsg_len - NLMSG_HDRLEN - GENL_HDRLEN);
		}
	}
}

static void keep_family(const struct nlattr *attributes, size_t bytes)
{
	size_t length;
	const uint16_t *family = find(attributes, bytes, CTRL_ATTR_FAMILY_ID, &length);

	if (family)
		channel.family = *family;
}

static void link_open(void)
{
	const int yes = 1;

	channel.socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
	if (channel.socket < 0)
		give_up("socket");
	setsockopt(channel.socket, SOL_NETLINK, NETLINK_CAP_ACK, &yes, sizeof(yes));
	setsockopt(channel.socket, SOL_NETLINK, NETLINK_EXT_ACK, &yes, sizeof(yes));
	request_begin(CTRL_CMD_GETFAMILY, 0);
	put(CTRL_ATTR_FAMILY_NAME, MERGEMEM_FAMILY_NAME, sizeof(MERGEMEM_FAMILY_NAME));
	errno = -request_send(keep_family);
	if (errno)
		give_up("is the module loaded? family mergemem");
}

#endif
