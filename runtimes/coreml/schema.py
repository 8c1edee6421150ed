"""The part of Core ML's protocol buffers that an ML program needs.

Field numbers follow Apple's published `Model.proto` and `MIL.proto`. Declaring them here, in a pool of their own, reads a
package within milliseconds; importing coremltools for its generated classes takes seconds and loads torchao.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

# message -> fields as "name number type"; a type that is another message of this table is read as that message, and a
# trailing * marks a repeated field. Maps are repeated key/value entries on the wire, and are declared as such.
_MESSAGES = {
    "Model": "specificationVersion 1 int32, description 2 ModelDescription, mlProgram 502 Program",
    "ModelDescription": "defaultFunctionName 21 string",
    "Program": "functions 2 FunctionEntry*",
    "FunctionEntry": "key 1 string, value 2 Function",
    "Function": "inputs 1 NamedValueType*, opset 2 string, block_specializations 3 BlockEntry*",
    "BlockEntry": "key 1 string, value 2 Block",
    "Block": "inputs 1 NamedValueType*, outputs 2 string*, operations 3 Operation*",
    "Operation": "type 1 string, inputs 2 ArgumentEntry*, outputs 3 NamedValueType*, blocks 4 Block*, attributes 5 ValueEntry*",
    "ArgumentEntry": "key 1 string, value 2 Argument",
    "Argument": "arguments 1 Binding*",
    "Binding": "name 1 string, value 2 Value",
    "ValueEntry": "key 1 string, value 2 Value",
    "NamedValueType": "name 1 string, type 2 ValueType",
    "ValueType": "tensorType 1 TensorType, listType 2 Opaque, tupleType 3 Opaque, dictionaryType 4 Opaque, stateType 5 Opaque",
    "Opaque": "",
    "TensorType": "dataType 1 int32, rank 2 int64, dimensions 3 Dimension*",
    "Dimension": "constant 1 ConstantDimension, unknown 2 Opaque",
    "ConstantDimension": "size 1 uint64",
    "Value": "type 2 ValueType, immediateValue 3 ImmediateValue, blobFileValue 5 BlobFileValue",
    "ImmediateValue": "tensor 1 TensorValue",
    "BlobFileValue": "fileName 1 string, offset 2 uint64",
    "TensorValue": "floats 1 Floats, ints 2 Ints, bools 3 Bools, strings 4 Strings, longInts 5 LongInts, doubles 6 Doubles, "
    "bytes 7 Bytes",
    "Floats": "values 1 float*",
    "Ints": "values 1 int32*",
    "Bools": "values 1 bool*",
    "Strings": "values 1 string*",
    "LongInts": "values 1 int64*",
    "Doubles": "values 1 double*",
    "Bytes": "values 1 bytes",
}
_PACKAGE = "coreml"


def _file() -> descriptor_pb2.FileDescriptorProto:
    field_types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="coreml.proto", package=_PACKAGE, syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for declaration in filter(None, fields.split(", ")):
            name, number, kind = declaration.split(" ")
            repeated = kind.endswith("*")
            kind = kind.removesuffix("*")
            field = message.field.add(
                name=name,
                number=int(number),
                label=field_types.LABEL_REPEATED if repeated else field_types.LABEL_OPTIONAL,
            )
            if kind in _MESSAGES:
                field.type = field_types.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
            else:
                field.type = getattr(field_types, f"TYPE_{kind.upper()}")
    return file


def _model_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


Model: Any = _model_class()
"""The message class; `Model.FromString(data)` raises `google.protobuf.message.DecodeError`."""
