# SPDX-License-Identifier: LGPL-2.1-or-later
# bash completion for memferry(1)

# Names of the sessions that memferryd has; silent where it can't be reached.
_memferry_names()
{
    memferry "$@" status 2>/dev/null | awk 'NR > 1 { print $1 }'
}

_memferry()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local verbs="receive migrate status set switch cancel check monitor forget"
    local verb="" named="" word i
    local -a runtime=()
    COMPREPLY=()

    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
        --runtime-dir)
            runtime=(--runtime-dir "${COMP_WORDS[++i]}")
            ;;
        --qmp | --to | --streams | --mode | --bandwidth | --max-rounds | --switch-after | --max-blackout | \
            --pid | --pause | --save | --load | --resume | --region | --timeout)
            ((i++))
            ;;
        -*) ;;
        *)
            if [[ -z $verb ]]; then
                verb=$word
            else
                named=yes
            fi
            ;;
        esac
    done

    case $prev in
    --qmp)
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
        return
        ;;
    --runtime-dir)
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -d -- "$cur")
        return
        ;;
    --to)
        mapfile -t COMPREPLY < <(compgen -A hostname -- "$cur")
        return
        ;;
    --mode)
        mapfile -t COMPREPLY < <(compgen -W "hybrid postcopy precopy" -- "$cur")
        return
        ;;
    --bandwidth)
        mapfile -t COMPREPLY < <(compgen -W "none 100M 1G 10G" -- "$cur")
        return
        ;;
    --max-rounds | --switch-after | --max-blackout | --timeout | --region)
        return # numbers, names
        ;;
    --pid)
        mapfile -t COMPREPLY < <(compgen -W "$(cd /proc && echo [0-9]*)" -- "$cur")
        return
        ;;
    --pause | --save | --load | --resume)
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -c -- "$cur")
        return
        ;;
    --streams)
        mapfile -t COMPREPLY < <(compgen -W "1 2 4 8 16" -- "$cur")
        return
        ;;
    esac

    local options="--help" process="--pid --pause --save --load --resume --region --timeout"
    case $verb in
    "") options="--runtime-dir --help --version" ;;
    receive) options+=" --qmp $process" ;;
    migrate)
        options+=" --qmp $process --to --json --detach --keep-source --streams --mode --bandwidth --max-rounds"
        options+=" --switch-after --max-blackout --fallback"
        ;;
    status | monitor) options+=" --json" ;;
    check) options+=" --json --pid --region" ;;
    esac
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
        return
    fi
    case $verb in
    "") mapfile -t COMPREPLY < <(compgen -W "$verbs" -- "$cur") ;;
    monitor)
        [[ -n $named ]] ||
            mapfile -t COMPREPLY < <(compgen -W "$(cd /proc && printf '%s ' [0-9]*)" -- "$cur")
        ;;
    set)
        if [[ -n $named ]]; then
            compopt -o nospace
            mapfile -t COMPREPLY < <(compgen -W "bandwidth=" -- "$cur")
        else
            mapfile -t COMPREPLY < <(compgen -W "$(_memferry_names "${runtime[@]}")" -- "$cur")
        fi
        ;;
    status | switch | cancel | forget)
        [[ -n $named ]] ||
            mapfile -t COMPREPLY < <(compgen -W "$(_memferry_names "${runtime[@]}")" -- "$cur")
        ;;
    esac
}

complete -F _memferry memferry
