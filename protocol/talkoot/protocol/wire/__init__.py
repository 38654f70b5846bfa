"""The data plane's wire schema. The ``*_pb2*`` modules are made by ``tools/gen_proto.sh``."""
