# Written by hand (grpcio-tools makes no types for services): keep it in step with transfer.proto.
from collections.abc import Iterator

import grpc

from talkoot.protocol.wire.transfer_pb2 import (
    Envelope,
    FetchChunk,
    FetchRequest,
    PieceList,
    PushChunk,
    PushState,
    PushStatusRequest,
)

class TransferStub:
    Fetch: grpc.UnaryStreamMultiCallable[FetchRequest, FetchChunk]
    Pieces: grpc.UnaryUnaryMultiCallable[FetchRequest, PieceList]
    PushStatus: grpc.UnaryUnaryMultiCallable[PushStatusRequest, PushState]
    Push: grpc.StreamUnaryMultiCallable[PushChunk, PushState]
    Submit: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    Prove: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    Challenge: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    Report: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    GetRun: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    GetTask: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    Renew: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    GetMirrors: grpc.UnaryUnaryMultiCallable[Envelope, Envelope]
    def __init__(self, channel: grpc.Channel) -> None: ...

class TransferServicer:
    def Fetch(
        self, request: FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[FetchChunk]: ...
    def Pieces(self, request: FetchRequest, context: grpc.ServicerContext) -> PieceList: ...
    def PushStatus(
        self, request: PushStatusRequest, context: grpc.ServicerContext
    ) -> PushState: ...
    def Push(
        self, request_iterator: Iterator[PushChunk], context: grpc.ServicerContext
    ) -> PushState: ...
    def Submit(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def Prove(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def Challenge(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def Report(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def GetRun(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def GetTask(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def Renew(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...
    def GetMirrors(self, request: Envelope, context: grpc.ServicerContext) -> Envelope: ...

def add_TransferServicer_to_server(servicer: TransferServicer, server: grpc.Server) -> None: ...
