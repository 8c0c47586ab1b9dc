/* SPDX-License-Identifier: MIT */
/*
 * Messages to the module from C, for clients that are to be many and fast.
 *
 * The kernel carries a request out within sendmsg(), and goes on with a dump within recvmsg(): when
 * a socket has nothing to receive, its answers are complete. So nobody here ever waits.
 */
#ifndef NETLINK_H
#define NETLINK_H

#include <errno.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../kmod/uapi/mergemem.h"

#define PAGE_BYTES 4096UL
/* PROCESSES and CANDIDATES at their limits, and mistakes beyond. */
#define MESSAGE_BYTES (128 << 10)
#define RECEIVE_BYTES (64 << 10)

struct message {
	size_t length;
	uint8_t bytes[MESSAGE_BYTES] __attribute__((aligned(8)));
};

/* What came back: an error, or attributes of replies, handed to a function one reply at a time. */
struct netlink {
	int socket;
	/* 0: to be looked up. */
	uint16_t family;
	uint32_t sequence;
	/* Of the last refusal; empty when it came without. */
	char text[160];
	uint8_t received[RECEIVE_BYTES] __attribute__((aligned(8)));
};

typedef void reply_function(const struct nlattr *attributes, size_t length, void *context);

static void die(const char *what)
{
	printf("wrong: %s: %s\n", what, strerror(errno));
	exit(1);
}

static struct nlmsghdr *message_begin(struct message *message, uint16_t type, uint16_t flags,
				      uint8_t command)
{
	struct nlmsghdr *header = (struct nlmsghdr *)message->bytes;
	struct genlmsghdr *generic = NLMSG_DATA(header);

	*header = (struct nlmsghdr){ .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags };
	*generic = (struct genlmsghdr){ .cmd = command, .version = 1 };
	message->length = NLMSG_LENGTH(GENL_HDRLEN);
	return header;
}

/* Room for an attribute's content; NULL when the message is full. */
static void *message_reserve(struct message *message, uint16_t kind, size_t length)
{
	struct nlattr *attribute = (struct nlattr *)(message->bytes + message->length);
	size_t padded = NLA_ALIGN(NLA_HDRLEN + length);

	if (message->length + padded > MESSAGE_BYTES)
		return NULL;
	memset(attribute, 0, padded);
	*attribute = (struct nlattr){ .nla_len = NLA_HDRLEN + length, .nla_type = kind };
	message->length += padded;
	return attribute + 1;
}

static void message_put(struct message *message, uint16_t kind, const void *content, size_t length)
{
	void *to = message_reserve(message, kind, length);

	if (to && length)
		memcpy(to, content, length);
}

static inline void message_put_u32(struct message *message, uint16_t kind, uint32_t value)
{
	message_put(message, kind, &value, sizeof(value));
}

static inline void message_put_u64(struct message *message, uint16_t kind, uint64_t value)
{
	message_put(message, kind, &value, sizeof(value));
}

/* The next attribute, or NULL behind the last one. */
static const struct nlattr *next_attribute(const struct nlattr **at, size_t *length)
{
	const struct nlattr *attribute = *at;
	size_t padded;

	if (*length < NLA_HDRLEN || attribute->nla_len < NLA_HDRLEN || attribute->nla_len > *length)
		return NULL;
	padded = NLA_ALIGN(attribute->nla_len);
	*at = (const struct nlattr *)((const uint8_t *)attribute + padded);
	*length -= padded < *length ? padded : *length;
	return attribute;
}

static const struct nlattr *find_attribute(const struct nlattr *at, size_t length, uint16_t kind)
{
	const struct nlattr *attribute;

	while ((attribute = next_attribute(&at, &length)))
		if ((attribute->nla_type & NLA_TYPE_MASK) == kind)
			return attribute;
	return NULL;
}

static const void *content_of(const struct nlattr *attribute)
{
	return attribute + 1;
}

static size_t length_of(const struct nlattr *attribute)
{
	return attribute->nla_len - NLA_HDRLEN;
}

static void netlink_open(struct netlink *link)
{
	int on = 1;

	memset(link, 0, offsetof(struct netlink, received));
	link->socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
	if (link->socket < 0 ||
	    setsockopt(link->socket, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof(on)) ||
	    setsockopt(link->socket, SOL_NETLINK, NETLINK_EXT_ACK, &on, sizeof(on)))
		die("netlink socket");
}

/* Whatever is under way on it ends. */
static void netlink_reopen(struct netlink *link)
{
	uint16_t family = link->family;

	close(link->socket);
	netlink_open(link);
	link->family = family;
}

/* Bytes as they are; 0, or a negative errno. */
static int netlink_send(struct netlink *link, const struct message *message)
{
	ssize_t sent = send(link->socket, message->bytes, message->length, 0);

	return sent < 0 ? -errno : 0;
}

/* The number at the start of an error or of the end of a dump, and the text behind it. */
static int read_verdict(struct netlink *link, const struct nlmsghdr *header)
{
	const int *error = NLMSG_DATA(header);
	/* With CAP_ACK, an error repeats the header of the request only. */
	size_t before = header->nlmsg_type == NLMSG_ERROR ? sizeof(struct nlmsgerr) : sizeof(int);
	const struct nlattr *text;

	if (*error && header->nlmsg_flags & NLM_F_ACK_TLVS) {
		text = find_attribute((const void *)((const uint8_t *)error + before),
				      NLMSG_PAYLOAD(header, before), NLMSGERR_ATTR_MSG);
		if (text)
			snprintf(link->text, sizeof(link->text), "%s",
				 (const char *)content_of(text));
	}
	return *error;
}

/*
 * Receives what there is, at most `parts` parts. Returns 0, or a negative errno: -EAGAIN when no
 * verdict came, which is right only for what asked for none or was not received to its end.
 */
static int netlink_receive(struct netlink *link, unsigned int parts, reply_function *reply,
			   void *context)
{
	int verdict = -EAGAIN;

	link->text[0] = 0;
	while (parts--) {
		ssize_t got = recv(link->socket, link->received, RECEIVE_BYTES, MSG_DONTWAIT);
		const struct nlmsghdr *header = (const struct nlmsghdr *)link->received;

		if (got < 0)
			return errno == EAGAIN ? verdict : -errno;
		for (; NLMSG_OK(header, (size_t)got); header = NLMSG_NEXT(header, got)) {
			if (header->nlmsg_type == NLMSG_ERROR || header->nlmsg_type == NLMSG_DONE)
				verdict = read_verdict(link, header);
			else if (reply)
				reply((const void *)((const uint8_t *)NLMSG_DATA(header) +
						     GENL_HDRLEN),
				      NLMSG_PAYLOAD(header, GENL_HDRLEN), context);
		}
	}
	return verdict;
}

static void take_family(const struct nlattr *attributes, size_t length, void *context)
{
	const struct nlattr *id = find_attribute(attributes, length, CTRL_ATTR_FAMILY_ID);

	if (id)
		memcpy(context, content_of(id), sizeof(uint16_t));
}

/* Completes the header, sends, and receives all there is. */
static int netlink_request(struct netlink *link, struct message *message, reply_function *reply,
			   void *context)
{
	struct nlmsghdr *header = (struct nlmsghdr *)message->bytes;
	int error;

	header->nlmsg_len = message->length;
	header->nlmsg_seq = ++link->sequence;
	header->nlmsg_flags |= NLM_F_ACK;
	error = netlink_send(link, message);
	return error ? error : netlink_receive(link, -1U, reply, context);
}

/* 0, or a negative errno: -ENOENT while the module is not loaded. */
static int netlink_find_family(struct netlink *link, struct message *message)
{
	int error;

	link->family = 0;
	message_begin(message, GENL_ID_CTRL, 0, CTRL_CMD_GETFAMILY);
	message_put(message, CTRL_ATTR_FAMILY_NAME, MERGEMEM_FAMILY_NAME,
		    sizeof(MERGEMEM_FAMILY_NAME));
	error = netlink_request(link, message, take_family, &link->family);
	return error ? error : link->family ? 0 : -ENOENT;
}

#endif
