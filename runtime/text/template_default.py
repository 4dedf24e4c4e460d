"""The chat template for checkpoints that bring none. A module of its own because it is text, not code."""

from __future__ import annotations

DEFAULT_TEMPLATE = """\
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- if system or tools or (messages and messages[0].role == 'system') %}
    {{- '<|im_start|>system\\n' }}
    {%- if tools %}
        {{- '# Tools\\n<tools>\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson }}
            {{- '\\n' }}
        {%- endfor %}
        {{- '</tools>\\nTo call a tool, write:\\n' }}
        {{- '<tool_call>\\n{"name": <name>, "arguments": <JSON object>}\\n</tool_call>' }}
        {{- '\\n\\n' if system else '' }}
    {%- endif %}
    {{- system }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set called = call.function or call %}
        {{- '\\n' if message.content or not loop.first else '' }}
        {{- '<tool_call>\\n{"name": "' + called.name + '", "arguments": ' }}
        {{- called.arguments if called.arguments is string else called.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
