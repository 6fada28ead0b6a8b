#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Makes the certificates of the tests anew, in this folder. Their keys are known to everybody and protect nothing.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
printf '%s\n' '[ca]' default_ca=d '[d]' "database=$work/index" "new_certs_dir=$work" rand_serial=yes \
	default_md=sha256 policy=p unique_subject=no '[p]' commonName=supplied > "$work/ca.conf"

key() {
	openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"
}

# name, its key, first and last day, who signs it, extensions
certificate() {
	name=$1 key=$2 from=$3 to=$4 signs=$5
	shift 5
	printf '%s\n' "$@" > "$work/ext"
	: > "$work/index"
	openssl req -new -key "$key" -subj "/CN=$name" -out "$work/csr"
	openssl ca -batch -notext -config "$work/ca.conf" $signs -extfile "$work/ext" \
		-startdate "$from" -enddate "$to" -in "$work/csr" -out "$name.pem"
}

authority() {
	key "$work/$1.key"
	certificate "$1" "$work/$1.key" 20200101000000Z 21200101000000Z "-selfsign -keyfile $work/$1.key" \
		basicConstraints=critical,CA:TRUE keyUsage=critical,keyCertSign subjectKeyIdentifier=hash
}

signed() {
	certificate "$@" keyUsage=critical,digitalSignature,keyEncipherment basicConstraints=critical,CA:FALSE
}

authority ca
authority other-ca
by="-cert ca.pem -keyfile $work/ca.key"
names=subjectAltName=DNS:server.example,IP:192.0.2.7,IP:127.0.0.1
key server.key
key client.key
signed server server.key 20200101000000Z 21200101000000Z "$by" "$names" extendedKeyUsage=serverAuth
signed expired server.key 20200101000000Z 20200201000000Z "$by" "$names" extendedKeyUsage=serverAuth
signed early server.key 21190101000000Z 21200101000000Z "$by" "$names" extendedKeyUsage=serverAuth
signed client client.key 20200101000000Z 21200101000000Z "$by" extendedKeyUsage=clientAuth
