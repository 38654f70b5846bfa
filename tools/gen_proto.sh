#!/bin/sh
# Regenerate the data plane's modules from their schema (needs grpcio-tools: the "dev" extra).
# -I protocol makes the generated import absolute: from talkoot.protocol.wire import transfer_pb2.
# transfer_pb2_grpc.pyi is written by hand, because grpcio-tools makes no types for services.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m grpc_tools.protoc -I protocol \
  --python_out=protocol --pyi_out=protocol --grpc_python_out=protocol \
  talkoot/protocol/wire/transfer.proto
