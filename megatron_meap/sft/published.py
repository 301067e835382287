"""Chat templates in the published formats, by name."""

_ALPACA_START = (
    "Below is an instruction that describes a task{{ ', paired with an input that provides further context' "
    "if messages[offset].input else '' }}. Write a response that appropriately completes the request."
)
_VICUNA_START = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_WITHOUT_SYSTEM = "{% set offset = 1 if messages[0].role == 'system' else 0 %}"
_SYSTEM_OR = "{% if offset %}{{ messages[0].content }}{% else %}<START>{% endif %}"

TEMPLATES = {
    "alpaca": _WITHOUT_SYSTEM
    + "{{ bos_token }}"
    + _SYSTEM_OR.replace("<START>", _ALPACA_START)
    + "{% for message in messages[offset:] %}{% if message.role == 'user' %}"
    "{{ '\n\n### Instruction:\n' + (message.instruction if message.input else message.content) }}"
    "{{ '\n\n### Input:\n' + message.input if message.input else '' }}{{ '\n\n### Response:\n' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}",
    "vicuna": _WITHOUT_SYSTEM
    + "{{ bos_token }}"
    + _SYSTEM_OR.replace("<START>", _VICUNA_START)
    + "{{ ' ' }}{% for message in messages[offset:] %}{% if message.role == 'user' %}"
    "{{ 'USER: ' + message.content + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}",
    "llama-2": _WITHOUT_SYSTEM + "{% for message in messages[offset:] %}{% if message.role == 'user' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if loop.first and offset else '' %}"
    "{{ bos_token + '[INST] ' + (system + message.content).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama-3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
"""Jinja templates by name."""
