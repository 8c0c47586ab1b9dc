#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# facts.sh OUTPUT SOURCE COMPILER FLAG...
#
# One run of the compiler over all probes of facts.c: a probe whose lines have
# an error is a fact that this kernel does not have. Kbuild calls this.
set -eu

output=$1
source=$2
shift 2

words=$(LC_ALL=C "$@" -fsyntax-only "$source" 2>&1) || true

printf '%s\n' "$words" | awk -v source="$source" -v output="$output.new" '
function fail(why)
{
	printf "%s: cannot find out about this kernel: %s\n", source, why | "cat >&2"
	failed = 1
	exit 1
}

# The file itself, first: where each probe begins, and what it says.
BEGIN {
	while ((getline line < source) > 0) {
		number++
		if (line ~ /^(FACT|FUNCTION|NEEDED)\(/) {
			count++
			kind[count] = line
			sub(/\(.*/, "", kind[count])
			name[count] = line
			sub(/^[A-Z]*\(/, "", name[count])
			sub(/,.*/, "", name[count])
			text[count] = ""
		}
		if (count && line !~ /^\/?[ ]?\*/)
			text[count] = text[count] " " line
		probe_at[number] = count
	}
}

# Then what the compiler says: FILE:LINE:COLUMN: error: ...
/: (fatal )?error: / {
	split(substr($0, length(source) + 2), place, ":")
	if (index($0, source ":") != 1 || !probe_at[place[1] + 0] || /fatal error/)
		fail($0)
	wrong[probe_at[place[1] + 0]] = 1
}

END {
	if (failed)
		exit 1
	for (i = 1; i <= count; i++)
		if (wrong[i] != (name[i] == "must_fail") && name[i] ~ /^must/)
			fail("the probe " name[i] " did not")
	print "/* Made by facts.sh. */" > output
	for (i = 1; i <= count; i++) {
		gsub(/[ \t]+/, " ", text[i])
		if (name[i] ~ /^must/)
			continue
		if (kind[i] != "NEEDED" && !wrong[i])
			print "#define MERGEMEM_HAVE_" name[i] " 1" > output
		else if (kind[i] != "NEEDED")
			print "/* not here:" text[i] " */" > output
		else if (wrong[i])
			print "#error mergemem does not know this kernel: no function " name[i] "() was found; tried:" text[i] > output
	}
}'
mv "$output.new" "$output"
