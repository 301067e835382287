"""The tools that a conversation offers, and the calls in its messages, in OpenAI's form, which templates expect."""

from typing import Any

from megatron_meap.sft.fields import BadConversation, kind, parsed, text


def tools_of(record: dict) -> list[Any] | None:
    """The tools that a record offers to the assistant, as templates expect them; None without any.

    Raises:
        BadConversation: they are not a list of objects, or JSON text of one.
    """
    tools = record.get("tools") or None
    if isinstance(tools, str):
        tools = parsed(tools, "tools") or None
    if tools is None and record.get("functions"):
        functions = record["functions"]
        functions = parsed(functions, "functions") if isinstance(functions, str) else functions
        if not isinstance(functions, list):
            raise BadConversation(f"has {kind(functions)} as 'functions', not a list of objects")
        tools = [{"type": "function", "function": each} for each in functions]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise BadConversation(f"has {kind(tools)} as 'tools', not a list of objects")
    return tools


def calls_of(entry: dict, said: str, content_key: str) -> list[Any]:
    """The calls of tools in a message, in OpenAI's form, with their arguments as objects, as templates expect them."""
    calls = entry.get("tool_calls") or []
    if isinstance(calls, str):
        calls = parsed(calls, "tool_calls")
    if entry.get("function_call"):
        calls = [{"type": "function", "function": entry["function_call"]}]
    elif said == "function_call":
        made = parsed(text(entry, content_key), content_key)
        calls = [{"type": "function", "function": each} for each in (made if isinstance(made, list) else [made])]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadConversation("has 'tool_calls' that are not a list of objects")
    return [_call(call) for call in calls]


def _call(call: dict) -> dict:
    """One call: a function's name and its arguments."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadConversation("calls a tool without the 'name' of its function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}", "arguments")
    kept = {name: value for name, value in call.items() if name == "id" and value is not None}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
